"""A way of pruning as the hooks see it: what it looks at on the way to a prune stage, and how it shortens a batch.

The hooks know two places, in front of a prune layer's MoE and behind the layer (`config.prunes_behind_layer`), and
nothing about who prunes there. FastMMoE's way is here, each baseline's beside its config.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastmmoe.attention import AttentionCall, last_row
from fastmmoe_kernels import PrunedBatch, VisionLayout, prune_batch


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
        rope, source: as in `prune_batch`.
    """

    stage: int
    hidden: torch.Tensor
    residual: torch.Tensor
    layout: VisionLayout
    seen: torch.Tensor | None
    prompt: torch.Tensor | None
    gate_probs: Callable[[torch.Tensor], torch.Tensor]
    rope: tuple[torch.Tensor, torch.Tensor]
    source: torch.Tensor | None


class Pruning:
    """How a config prunes. It has no state: everything a forward remembers is with the forward.

    Attributes:
        config: whose way of pruning this is.
        looks: `look` gets a prune layer's attention call.
    """

    looks = True

    def __init__(self, config: Any):
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
        """What a stage needs of its layer's attention."""
        raise NotImplementedError

    def prune(self, tokens: StageInput) -> PrunedBatch:
        """Shorten a batch."""
        raise NotImplementedError


class FastMMoEPruning(Pruning):
    """Merge redundant windows and keep important tokens (method section 2)."""

    def look(self, call: AttentionCall) -> torch.Tensor:
        return last_row(call, self.config.backend)

    def prune(self, tokens: StageInput) -> PrunedBatch:
        config = self.config
        return prune_batch(
            tokens.hidden,
            tokens.residual,
            tokens.gate_probs(tokens.hidden),
            tokens.seen,
            tokens.layout,
            rope=tokens.rope,
            source=tokens.source,
            keep_ratio=config.stage_keep_ratios[tokens.stage],
            merge_ratio=config.merge_ratio,
            window=config.window,
            alpha=config.alpha,
            strategy=config.strategy,
            keep_by=config.keep_by,
            merge_method=config.merge_method,
            backend=config.backend,
        )


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
        rope=tokens.rope,
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
