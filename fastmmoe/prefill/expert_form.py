"""Which form of `moe_experts` a model's experts module has: by how it describes itself, and by asking it.

Modules of transformers' experts interface say how their weights lie. What they do between the projections they do not
say: that is compared with everything `moe_experts` can do, on a few numbers.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fastmmoe_kernels import moe_experts
from fastmmoe_kernels.experts.options import ExpertOptions
from fastmmoe_kernels.experts.reference import activate

# how transformers' experts modules describe themselves, and how those do that follow its oldest layout and say nothing
FLAGS = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
# on both sides of any limit that a module clamps at
PROBE = (-1e4, -1e3, -100.0, -30.0, -3.0, -1.0, -0.3, 0.2, 0.6, 1.7, 4.0, 30.0, 100.0, 1e3, 1e4)


class ExpertForm(NamedTuple):
    """How to run an experts module by `moe_experts`.

    Attributes:
        projections: names of gate and up projection, and of the down projection.
        biases: names of theirs; () without.
        is_transposed: the projections are [E, in, out].
        options: the other options of `moe_experts`.
    """

    projections: tuple[str, str]
    biases: tuple[str, ...]
    is_transposed: bool
    options: dict[str, Any]

    def run(
        self,
        experts: nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        backend: str,
        max_pairs: int | None = None,
    ) -> torch.Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]; ids >= E are skipped, of which `max_pairs` says how many are not."""
        projections = [getattr(experts, name) for name in self.projections]
        if self.is_transposed:
            projections = [projection.mT for projection in projections]
        biases = {
            argument: getattr(experts, name)
            for argument, name in zip(("gate_up_bias", "down_bias"), self.biases, strict=False)
        }
        options = biases | self.options
        return moe_experts(hidden, *projections, ids, weights, **options, max_pairs=max_pairs, backend=backend)


def expert_form(experts: nn.Module, plain_class: str = "") -> ExpertForm:
    """The form of an experts module.

    Args:
        plain_class: name of a class outside of the interface that follows its layout.

    Raises:
        ValueError: a class that does not go through transformers' experts interface, that computes what `moe_experts`
            does not know, or weights that are no plain floating tensors (quantized, sharded).
    """
    name = type(experts).__name__
    is_plain = name == plain_class
    flags = {flag: getattr(experts, flag, wanted if is_plain else None) for flag, wanted in FLAGS.items()}
    for flag, value in flags.items():
        if value is None:
            raise ValueError(f"experts: {name} does not say {flag}, expected a class of the experts interface")
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(f"experts: {name} has has_post_expert_norm=True, expected False")
    if not is_plain and not hasattr(type(experts).forward, "__wrapped__"):
        raise ValueError(f"experts: {name} has a forward of its own, expected that of the experts interface")
    projections = ("gate_up_proj" if flags["has_gate"] else "up_proj", "down_proj")
    biases = tuple(f"{projection}_bias" for projection in projections) if flags["has_bias"] else ()
    for attribute in projections + biases:
        weight = getattr(experts, attribute, None)
        dims = 2 if attribute in biases else 3
        if not isinstance(weight, torch.Tensor) or weight.dim() != dims or not weight.is_floating_point():
            raise ValueError(f"experts: {name}.{attribute} is no floating tensor of {dims} dimensions (quantized?)")
        if type(weight) not in (torch.Tensor, nn.Parameter):
            raise ValueError(f"experts: {name}.{attribute} is a {type(weight).__name__}, expected a plain tensor")
    others = sorted(set(experts._parameters) - {*projections, *biases})
    if others:
        raise ValueError(f"experts: {name} has parameters {others} beside its projections, expected none")
    options = _activation_of(experts, flags["has_gate"], interleaved=not flags["is_concatenated"])
    return ExpertForm(projections, biases, flags["is_transposed"], options)


def _activation_of(experts: nn.Module, has_gate: bool, interleaved: bool) -> dict[str, Any]:
    """The options of `moe_experts` under which it does the same between the projections."""
    probe = torch.tensor(PROBE)
    gate, up = torch.cartesian_prod(probe, probe).T if has_gate else (None, probe)
    asked = torch.stack((gate, up), -1) if has_gate else up.unsqueeze(-1)
    try:
        with torch.no_grad():
            want = experts._apply_gate(asked) if has_gate else experts.act_fn(asked)
    except Exception as error:
        raise ValueError(f"experts: what {type(experts).__name__} does with gate and up cannot be asked") from error
    for options in _candidates(experts, has_gate):
        # the gate's block first, then the up projection's
        got = torch.empty(len(up), 1)
        rows = torch.stack((gate, up)) if has_gate else up.unsqueeze(0)
        activate(rows.unsqueeze(-1).clone(), ExpertOptions(**options), got)
        if want.shape == got.shape and torch.allclose(want.float(), got, rtol=1e-5, atol=1e-6):
            return options | ({"interleaved": True} if interleaved else {})
    raise ValueError(
        f"experts: {type(experts).__name__} combines gate and up in a way of its own, expected one of moe_experts'"
    )


def _candidates(experts: nn.Module, has_gate: bool) -> Iterator[dict[str, Any]]:
    """What `moe_experts` can do, with the numbers that the module has."""
    if not has_gate:
        yield {"activation": "relu2"}
        return
    yield {"activation": "silu"}
    yield {"activation": "gelu_tanh"}
    numbers = {name: value for name, value in vars(experts).items() if isinstance(value, (int, float))}
    limits = [float(value) for name, value in numbers.items() if "limit" in name and 0 < value < float("inf")]
    alphas = [float(value) for name, value in numbers.items() if "alpha" in name and value > 0]
    for limit in dict.fromkeys(limits):
        yield {"activation": "clamped_silu", "limit": limit}
        yield {"activation": "silu_clamped", "limit": limit}
        for alpha in dict.fromkeys(alphas):
            yield {"activation": "oai", "limit": limit, "alpha": alpha}

