"""What `moe_experts` takes beside tokens, weights and routing: the form of an expert."""

from typing import NamedTuple

import torch

from fastmmoe_kernels.checks import check_choice, check_float, check_int, check_tensor

ACTIVATIONS = ("silu", "clamped_silu", "silu_clamped", "oai", "gelu_tanh", "relu2")
CLAMPED = ("clamped_silu", "silu_clamped", "oai")
DEFAULT_ALPHA = 1.702


class ExpertOptions(NamedTuple):
    """The options of `moe_experts`, which says what they mean, for E experts, H features and I intermediate ones.

    `library.register` flattens them: their order and types are the schema of the op.
    """

    gate_up_bias: torch.Tensor | None = None  # [E, 2I], [E, I] without a gate; hidden's dtype or float32
    down_bias: torch.Tensor | None = None  # [E, H]; likewise
    activation: str = "silu"
    limit: float | None = None
    alpha: float = DEFAULT_ALPHA
    interleaved: bool = False
    max_pairs: int | None = None

    @property
    def has_gate(self) -> bool:
        return self.activation != "relu2"

    def check(self, hidden: torch.Tensor, num_experts: int, intermediate: int) -> None:
        """Refuse an option of another type, shape, dtype, device or range, or one that the activation does not have."""
        activation, limit, alpha, interleaved = self.activation, self.limit, self.alpha, self.interleaved
        check_choice("activation", activation, ACTIVATIONS)
        if activation in CLAMPED:
            if limit is None:
                raise ValueError(f"limit: expected a number with activation={activation!r}, got None")
            check_float("limit", limit, 0.0, float("inf"), low_open=True)
        elif limit is not None:
            raise ValueError(f"limit: expected None with activation={activation!r}, got {limit!r}")
        check_float("alpha", alpha, 0.0, float("inf"), low_open=True)
        if activation != "oai" and alpha != DEFAULT_ALPHA:
            raise ValueError(f"alpha: expected {DEFAULT_ALPHA} with activation={activation!r}, got {alpha}")
        if not isinstance(interleaved, bool):
            raise TypeError(f"interleaved: expected a bool, got {type(interleaved).__name__}")
        if interleaved and not self.has_gate:
            raise ValueError(f"interleaved: expected False with activation={activation!r}, which has no gate, got True")
        if self.max_pairs is not None:
            check_int("max_pairs", self.max_pairs, 1)
        rows = 2 * intermediate if self.has_gate else intermediate
        biases = {"gate_up_bias": (self.gate_up_bias, rows), "down_bias": (self.down_bias, hidden.shape[1])}
        for name, (bias, size) in biases.items():
            if bias is not None:
                check_tensor(name, bias, (num_experts, size), (hidden.dtype, torch.float32), hidden.device)


SWIGLU = ExpertOptions()
