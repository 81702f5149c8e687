"""A step with vision tokens: the model's own layers, in stretches between prune stages.

Every other step, decoding among them, is vLLM's own compiled model, untouched.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce

from fastmmoe.engines.vllm.plan import Step
from fastmmoe.methods import FastMMoEConfig
from fastmmoe.methods.method import StageInput
from fastmmoe_kernels import PrunedBatch, VisionLayout, last_query_attention


def _gate_logits(moe: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return moe.gate(tokens)[0]


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Where a text model of vLLM's keeps what a reduced prefill works on.

    A layer is called with (positions, hidden, residual) and returns (hidden, residual), of packed tokens: the residual
    stream behind its attention is their sum.

    Attributes:
        layers: the decoder layers.
        norm: behind the last one, called with (hidden, residual).
        gate_logits: (a layer's MoE, tokens floating [T, H]) -> its gate's logits, floating [T, E].
    """

    layers: nn.ModuleList
    norm: nn.Module
    gate_logits: Callable[[nn.Module, torch.Tensor], torch.Tensor] = _gate_logits


class Tokens:
    """The packed tokens of a step, on their way through the layers.

    Attributes:
        step: the host's plan.
        stage: how many prune stages they are behind.
        vision: bool [T], those that take fewer experts.
        origin: int64 [T], their places in the step's input.
        layout: of the rows that are pruned, right-padded; None in front of the first stage.
    """

    def __init__(self, step: Step, device: torch.device):
        self.step, self.stage = step, 0
        self.vision = to_device(step.vision_rows(), device)
        self.origin = torch.arange(len(self.vision), device=device)
        self.layout: VisionLayout | None = None

    @property
    def n_vision(self) -> int:
        """How many of them take fewer experts."""
        return self.step.n_vision[self.stage]

    def left_of(self, rows: torch.Tensor) -> torch.Tensor:
        """[T, ...] of the step's input, and padding -> of these tokens; a merged one has those of its first."""
        return rows[self.origin] if self.layout is not None else rows[: len(self.origin)]


def to_device(host: np.ndarray, device: torch.device) -> torch.Tensor:
    """Without waiting for the device."""
    tensor = torch.from_numpy(host)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def prune_layer(
    tokens: Tokens,
    layers: Layers,
    layer: nn.Module,
    scoring: str,
    config: FastMMoEConfig,
    positions: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer with a prune stage between its attention and its MoE (method section 2).

    Args:
        tokens: of the step; they are behind the stage afterwards.
        layers: of the model.
        layer: one of them.
        scoring: how its gate scores, "softmax" or "sigmoid".
        config: what to keep.
        positions: int64 [..., T].
        hidden, residual: floating [T, H].

    Returns:
        positions, hidden and residual behind the layer, of the tokens that are left.
    """
    if residual is None:
        hidden, residual = layer.input_layernorm(hidden), hidden
    else:
        hidden, residual = layer.input_layernorm(hidden, residual)
    attention = layer.self_attn
    seen: list[torch.Tensor] = []
    hook = attention.attn.register_forward_pre_hook(lambda _, args: seen.extend(args[:2]))
    try:
        hidden = attention(positions=positions, hidden_states=hidden)
    finally:
        hook.remove()
    hidden, residual = layer.post_attention_layernorm(hidden, residual)
    if any(row.is_pruned_now and row.prompt.removed(tokens.stage + 1) > row.prompt.removed(tokens.stage)
           for row in tokens.step.rows):  # fmt: skip
        positions, hidden, residual = _prune(tokens, layers, layer, scoring, config, positions, hidden, residual, *seen)
    else:
        tokens.stage += 1
    return positions, layer.mlp(hidden), residual


def _prune(
    tokens: Tokens,
    layers: Layers,
    layer: nn.Module,
    scoring: str,
    config: FastMMoEConfig,
    positions: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stage, device = tokens.stage, hidden.device
    cut = tokens.step.cut(stage)
    if cut.layout is not None:
        tokens.layout = cut.layout.to(device)
    layout = tokens.layout
    padded, asking, prompts, packed = (
        to_device(table, device) for table in (cut.padded, cut.asking, cut.prompts, cut.packed)
    )
    rows, width = layout.batch_size, layout.width
    attn = layer.self_attn.attn
    keys = key.view(-1, attn.num_kv_heads, attn.head_size)[padded].unflatten(0, (rows, width))  # [P, n, Hkv, D]
    importance = last_query_attention(
        query.view(-1, attn.num_heads, attn.head_size)[asking],  # [P, Hq, D]
        keys.transpose(1, 2),
        scale=attn.impl.scale,
        key_mask=torch.arange(width, device=device) < prompts.unsqueeze(1),  # what was generated does not ask
        backend=config.backend,
    )
    short = hidden[padded]  # [P * n, H]
    logits = layers.gate_logits(layer.mlp, short).float()
    probs = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    importance, probs = _agreed(importance, probs.view(rows, width, -1))
    pruned = config.pruning().prune(
        StageInput(
            stage=stage,
            hidden=short.view(rows, width, -1),
            residual=residual[padded].view(rows, width, -1),
            layout=layout,
            seen=importance,
            prompt=None,
            gate_probs=lambda _: probs,
            source=None,
        )
    )
    return _pack(tokens, pruned, padded.view(rows, width), packed, positions, hidden, residual)


def _agreed(importance: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the heads of all ranks, and the first rank's word on it: every rank keeps the same tokens."""
    group = get_tp_group()
    if group.world_size == 1:
        return importance, probs
    importance = tensor_model_parallel_all_reduce(importance) / group.world_size
    return group.broadcast(importance.contiguous()), group.broadcast(probs.contiguous())


def _pack(
    tokens: Tokens,
    pruned: PrunedBatch,
    padded: torch.Tensor,
    packed: torch.Tensor,
    positions: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens behind a stage: those of other rows as they were, and what is left of the pruned ones."""
    source = padded.gather(1, pruned.index.clamp_min(0)).flatten()  # [P * n'] among the tokens in front of the stage
    before = torch.cat((torch.arange(len(hidden), device=hidden.device), source))[packed]  # [T']
    reduces = tokens.vision[before]
    tokens.stage += 1
    tokens.layout, tokens.origin, tokens.vision = pruned.layout, tokens.origin[before], reduces
    return (
        positions[..., before],
        torch.cat((hidden, pruned.hidden.flatten(0, 1)))[packed],
        torch.cat((residual, pruned.residual.flatten(0, 1)))[packed],
    )


def restore(tokens: Tokens, hidden: torch.Tensor, length: int) -> torch.Tensor:
    """[T', H] behind the last stage -> [T, H], where the step's logits are read; zeros at tokens that are gone."""
    full = hidden.new_zeros(length, hidden.shape[1])
    return full.index_copy_(0, tokens.origin, hidden)
