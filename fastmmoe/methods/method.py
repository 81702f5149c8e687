"""A way of pruning as a prefill sees it: what it looks at on the way to a prune stage, and how it shortens a batch.

A prefill knows two places, in front of a prune layer's MoE and behind the layer (`config.prunes_behind_layer`), and
nothing about who prunes there. Each method has a file of its own, its config and its pruning together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastmmoe.config import ReductionConfig
from fastmmoe.methods.entry import Entry
from fastmmoe_kernels import PrunedBatch, VisionLayout, last_query_attention, prune_batch


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(ReductionConfig):
    """Base of the configs of methods to compare with: fewer experts for vision tokens combine with any pruning.

    Args:
        vision_top_k: experts per vision token (method section 1); None leaves the model's own K.
        reduction_layer: first layer that uses `vision_top_k`; layers count from 0.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".
        min_vision_tokens: a prefill with fewer vision tokens than this, over its whole batch, runs the stock model.
    """

    vision_top_k: int | None = None
    reduction_layer: int = 2
    backend: str = "auto"
    min_vision_tokens: int = 0

    @classmethod
    def study_entries(cls) -> tuple[Entry, ...]:
        """How the study compares the method with others."""
        raise NotImplementedError


@dataclass(frozen=True)
class AttentionCall:
    """What the attention of a prune layer works on; all tensors are on one device.

    Attributes:
        query: floating [B, Hq, n, D], of the new tokens, position encoding applied.
        key: floating [B, Hkv, keys, D], cached tokens first and then the new ones.
        scale: factor of the logits.
        layout: of the n new tokens.
        key_mask: bool [B, keys], true at valid keys; None: all are valid.
        visible: bool [B, Hm, n, keys], which keys each new token sees, Hm being 1 or a divisor of Hq; None: the valid
            ones up to itself.
        sinks: floating [Hq], logits of keys without a value, one per head; None: there are none.
        back: how many tokens at a sample's end are candidates or answers: the token in front of them asks.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    layout: VisionLayout
    key_mask: torch.Tensor | None
    visible: torch.Tensor | None
    sinks: torch.Tensor | None
    back: int


@dataclass(frozen=True)
class StageInput:
    """What reaches a prune stage; every tensor is on the device of `hidden`.

    Attributes:
        stage: counted from 0.
        hidden: floating [B, n, H], the MoE's input; behind a layer, the layer's output.
        residual: floating [B, n, H], the residual stream; behind a layer, `hidden` again.
        layout: where the vision tokens are.
        seen: what `Pruning.look` returned; None if it does not look.
        prompt: what `Pruning.read_prompt` returned.
        gate_probs: hidden [B, n, H] -> the gate's probabilities, float32 [B, n, E]. Not for a layer without experts.
        source: as in `prune_batch`.
    """

    stage: int
    hidden: torch.Tensor
    residual: torch.Tensor
    layout: VisionLayout
    seen: torch.Tensor | None
    prompt: torch.Tensor | None
    gate_probs: Callable[[torch.Tensor], torch.Tensor]
    source: torch.Tensor | None


class Pruning:
    """How a config prunes. It has no state: everything a forward remembers is with the forward.

    Attributes:
        config: whose way of pruning this is.
        looks: `look` gets a prune layer's attention call.
    """

    looks = True

    def __init__(self, config: ReductionConfig):
        self.config = config

    def prunes(self, stage: int, layout: VisionLayout) -> bool:
        """Whether a stage changes a batch; the host knows before the stage runs."""
        return any(self.config.vision_left(stage, n) < n for n in layout.n_vision)

    def read_prompt(
        self, embeddings: Callable[[], torch.Tensor], layout: VisionLayout, back: int
    ) -> torch.Tensor | None:
        """What all stages need of the prompt.

        Args:
            embeddings: the text model's input, floating [B, n, H], when it is called.
            layout: of the n tokens, on any device.
            back: how many tokens at a sample's end are candidates or answers, not the prompt.
        """
        return None

    def look(self, call: AttentionCall) -> torch.Tensor:
        """What a stage needs of its layer's attention: floating, a mean over the call's heads.

        Where processes split a layer's heads, it goes on with the mean of what they see.
        """
        raise NotImplementedError

    def prune(self, tokens: StageInput) -> PrunedBatch:
        """Shorten a batch."""
        raise NotImplementedError


def last_row(call: AttentionCall, backend: str) -> torch.Tensor:
    """The asking token's attention to the new tokens, head mean: float32 [B, n]."""
    query, layout, back, mask = call.query, call.layout, call.back, call.key_mask
    batch, heads, n, width = query.shape
    keys = call.key.shape[2]
    if layout.padding_side == "left":
        asking = query[:, :, n - 1 - back]  # [B, Hq, D]
        visible = None if call.visible is None else call.visible[:, :, n - 1 - back]  # [B, Hm, keys]
    else:
        last = tuple(length - 1 - back for length in layout.lengths)
        last = layout.device_table((last,)).long().view(-1, 1, 1, 1)
        asking = query.gather(2, last.expand(-1, heads, 1, width))[:, :, 0]
        visible = call.visible
        if visible is not None:
            visible = visible.gather(2, last.expand(-1, visible.shape[1], 1, keys))[:, :, 0]
    if back:
        # candidates behind the asking token are no keys of its row
        ends = tuple(
            keys - n + start + length - back for start, length in zip(layout.starts, layout.lengths, strict=True)
        )
        seen = torch.arange(keys, device=query.device) < layout.device_table((ends,)).view(-1, 1)
        mask = seen if mask is None else mask & seen
    if visible is not None:
        mask = visible if mask is None else mask.unsqueeze(1) & visible
        mask = mask[:, 0] if mask.shape[1] == 1 else mask.contiguous()
    row = last_query_attention(asking, call.key, scale=call.scale, key_mask=mask, sinks=call.sinks, backend=backend)
    return row[:, keys - n :].contiguous()


def keep_best(
    tokens: StageInput, importance: torch.Tensor, targets: tuple[int, ...], backend: str = "auto"
) -> PrunedBatch:
    """Keep the `targets[b]` vision tokens of sample b with the largest importance [B, n]; ties to the earlier one."""
    return prune_batch(
        tokens.hidden,
        tokens.residual,
        importance.new_zeros(*importance.shape, 1),
        importance,
        tokens.layout,
        source=tokens.source,
        targets=targets,
        # nothing is merged, so no redundancy is asked for
        merge_ratio=0.0,
        window=1,
        alpha=0.0,
        strategy="dynamic_attention",
        merge_method="mean",
        backend=backend,
    )
