"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764): drop once, behind an early layer, what gets little attention."""

from dataclasses import dataclass

import torch

from fastmmoe.config import checked, choice, int_from
from fastmmoe.methods.attention_rows import attention_rows, last_positions
from fastmmoe.methods.entry import Entry, Place
from fastmmoe.methods.method import AttentionCall, BaselineConfig, Pruning, StageInput, keep_best, last_row
from fastmmoe_kernels import PrunedBatch, VisionLayout

QUERIES = ("last", "mean")
CHUNK = 256  # query rows at a time


@dataclass(frozen=True)
class FastVConfig(BaselineConfig):
    """FastV with K = `layer` and R = 1 - `retention`.

    Layers 0 to K-1 run on all tokens, and their caches stay full. In front of layer K the vision tokens are ranked by
    layer K-1's attention to them, mean over heads; the best `round(n_vision * retention)` stay (Python's round;
    **ours**: one at least, and ties go to the earlier token), and all text, in order and at their original positions.

    Args:
        layer: K, at least 1.
        retention: share of the vision tokens kept, in (0, 1].
        query: "last", the attention of a sample's last token, as the official code has it (FastV issues 14,
            44 and 48), or "mean", over all of its query rows, as the paper says.
    """

    layer: int = checked(2, int_from(1))
    retention: float = 0.5
    query: str = checked("last", choice(QUERIES))

    prunes_behind_layer = True

    @property
    def prune_layers(self) -> tuple[int, ...]:
        """The layer whose attention ranks the tokens, and whose output is pruned."""
        return (self.layer - 1,)

    def vision_left(self, stage: int, n_vision: int) -> int:
        """Vision tokens of one sample left of `n_vision`."""
        return min(n_vision, max(1, round(n_vision * self.retention)))

    def pruning(self) -> Pruning:
        return _FastVPruning(self)

    def check_model(self, num_hidden_layers: int, num_experts_per_tok: int) -> None:
        """As `ReductionConfig.check_model`; also refuses a K behind the last layer."""
        if self.layer >= num_hidden_layers:
            raise ValueError(
                f"layer={self.layer}: the model has {num_hidden_layers} layers, expected a layer from 1 to "
                f"{num_hidden_layers - 1}"
            )
        super().check_model(num_hidden_layers, num_experts_per_tok)

    @classmethod
    def study_entries(cls) -> tuple[Entry, ...]:
        """One entry, with pruning behind the place's layer. By definition FastV prunes once: it has no stages."""

        def configs(place: Place) -> tuple[FastVConfig, ...]:
            if len(place.layers) > 1:
                return ()
            return (cls(layer=place.layers[0] + 1, retention=place.retention, **place.experts),)

        return (Entry("FastV", "tab:orange", configs, is_reference=True),)


class _FastVPruning(Pruning):
    def look(self, call: AttentionCall) -> torch.Tensor:
        """Attention that each new token gets, float32 [B, n]."""
        if self.config.query == "last":
            return last_row(call, self.config.backend)
        received = received_attention(
            call.query,
            call.key,
            call.layout,
            scale=call.scale,
            key_mask=call.key_mask,
            visible=call.visible,
            sinks=call.sinks,
            back=call.back,
        )
        return received[:, call.key.shape[2] - call.query.shape[2] :].contiguous()

    def prune(self, tokens: StageInput) -> PrunedBatch:
        targets = tuple(self.config.vision_left(tokens.stage, n) for n in tokens.layout.n_vision)
        return keep_best(tokens, tokens.seen, targets, self.config.backend)


def received_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    layout: VisionLayout,
    *,
    scale: float,
    key_mask: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    back: int = 0,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Attention that each key gets, mean over heads and over a sample's query rows (FastV's `query="mean"`).

    A query attends to nothing behind it: an early token is seen by more rows. `chunk` rows are computed at a time,
    never an n x n matrix.

    Args:
        query, key, scale, key_mask, visible, sinks: as in `attention_rows`.
        layout: of the n new tokens.
        back: how many tokens at a sample's end are no query rows.

    Returns:
        float32 [B, keys]; each sample sums to 1.
    """
    counts = tuple(length - back for length in layout.lengths)
    positions = last_positions(layout, counts, back)
    total = key.new_zeros(key.shape[0], key.shape[2], dtype=torch.float32)
    for part in positions.split(chunk, dim=1):
        total += attention_rows(query, key, part, scale=scale, key_mask=key_mask, visible=visible, sinks=sinks).sum(1)
    return total / layout.device_table((counts,)).view(-1, 1)
