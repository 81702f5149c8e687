"""Stretches of layers between prune stages, each compiled as vLLM compiles a model."""

import types

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.sequence import IntermediateTensors


class Stretch(nn.Module):
    """Consecutive layers of a text model.

    Args:
        layers: (number, layer), whose parameters stay the model's own.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layers: tuple[tuple[int, nn.Module], ...]):
        super().__init__()
        # in a tuple they are not registered: the checkpoint has their weights once
        self.numbered = layers

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        added: IntermediateTensors | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """positions int64 [..., T], hidden and residual floating [T, H]; `added` [T, H] behind layers by number."""
        for number, layer in self.numbered:
            hidden_states, residual = layer(positions, hidden_states, residual)
            if added is not None and str(number) in added.tensors:
                hidden_states = hidden_states + added.tensors[str(number)]
        return hidden_states, residual


def make_stretch(vllm_config: VllmConfig, layers: tuple[tuple[int, nn.Module], ...]) -> Stretch:
    """A stretch with a class of its own: vLLM's cache of compiled code tells classes apart by name, not instances."""
    name = f"Stretch{layers[0][0]}To{layers[-1][0]}"
    forward = types.FunctionType(
        Stretch.forward.__code__, Stretch.forward.__globals__, "forward", Stretch.forward.__defaults__
    )
    forward.__qualname__, forward.__annotations__ = f"{name}.forward", dict(Stretch.forward.__annotations__)
    made = type(name, (Stretch,), {"forward": forward, "__module__": __name__})
    compiled = support_torch_compile(
        dynamic_arg_dims={"positions": -1, "hidden_states": 0, "residual": 0, "added": 0}
    )(made)
    return compiled(vllm_config=vllm_config, layers=layers)
