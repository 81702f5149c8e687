"""Base of the methods that prune without a look at the picture.

In front of a prune layer's MoE, and with the counts of method section 2.1.
"""

from dataclasses import dataclass

import torch

from fastmmoe.config import StagedConfig
from fastmmoe.methods.method import BaselineConfig, Pruning, StageInput, keep_best
from fastmmoe_kernels import PrunedBatch, VisionLayout


@dataclass(frozen=True)
class BlindConfig(BaselineConfig, StagedConfig):
    """Base of the configs that prune by the number of vision tokens alone.

    Args:
        prune_layers, retention, keep_ratios: as in `FastMMoEConfig`.
    """

    prune_layers: tuple[int, ...] = ()
    retention: float = 1.0
    keep_ratios: tuple[float, ...] | None = None

    def importance(self, stage: int, layout: VisionLayout) -> torch.Tensor:
        """float32 [B, n]: what a stage (counted from 0) ranks the vision tokens by."""
        raise NotImplementedError

    def pruning(self) -> Pruning:
        return _BlindPruning(self)


class _BlindPruning(Pruning):
    looks = False

    def prune(self, tokens: StageInput) -> PrunedBatch:
        config, layout = self.config, tokens.layout
        targets = tuple(config.vision_left(tokens.stage, n) for n in layout.n_vision)
        return keep_best(tokens, config.importance(tokens.stage, layout), targets, config.backend)


def at_vision_tokens(layout: VisionLayout, rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Each sample's values `[n_vision]`, known to the host, to where its vision tokens are: [B, n], 0 elsewhere."""
    most = max(layout.n_vision)
    # kept by the layout, and so for a CUDA graph
    table = layout.device_table(tuple(row + (0,) * (most - len(row)) for row in rows)).float()
    vision = layout.vision_mask
    ordinal = (vision.cumsum(1) - 1).clamp_min(0)
    return torch.where(vision, table.gather(1, ordinal), 0.0)
