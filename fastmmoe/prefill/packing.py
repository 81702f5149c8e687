"""Packed batches: samples of different lengths one behind the other in a single row, without padding.

Pruning works on a padded batch. At a prune layer the row is spread out to one, and what is left is packed again; every
other layer sees the row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from fastmmoe.prefill.masks import CallerMask
from fastmmoe_kernels import VisionLayout


@dataclass(frozen=True)
class Packing:
    """Where S samples of W tokens at most stand in a row of T tokens. Made on the device from lengths the host knows.

    Attributes:
        bounds: int32 [S + 1], where samples begin in the row, and T: `cu_seq_lens` of flash attention.
        sample: int64 [T], the sample of each token of the row.
        place: int64 [T], its position in the padded batch, sample * W + position in the sample.
        row: int64 [S, W], position in the row of each token of the padded batch; some token's at padding.
    """

    bounds: torch.Tensor
    sample: torch.Tensor
    place: torch.Tensor
    row: torch.Tensor

    @classmethod
    def of(cls, layout: VisionLayout) -> "Packing":
        """The packing of a padded batch's valid tokens."""
        ends = tuple(accumulate(layout.lengths))
        start, end, first = layout.device_table(((0, *ends[:-1]), ends, layout.starts)).long()
        token = torch.arange(ends[-1], device=layout.device)
        sample = torch.searchsorted(end, token, right=True)
        position = torch.arange(layout.width, device=layout.device)
        return cls(
            torch.cat((start, end[-1:])).int(),
            sample,
            sample * layout.width + first[sample] + token - start[sample],
            (start.unsqueeze(1) + position - first.unsqueeze(1)).clamp(0, ends[-1] - 1),
        )

    @property
    def tokens(self) -> int:
        return self.sample.shape[0]

    def pad(self, packed: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """[1, ..., T, ...] -> [S, ..., W, ...], T standing at `dim`; padding holds some token's values."""
        rows = packed.squeeze(0).index_select(dim - 1, self.row.flatten().to(packed.device))
        return rows.unflatten(dim - 1, self.row.shape).movedim(dim - 1, 0)

    def pad_pairs(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, 1, T, T] -> [S, 1, W, W]; padding holds some token's values."""
        row = self.row.to(packed.device)
        return packed[0, 0][row.unsqueeze(2), row.unsqueeze(1)].unsqueeze(1)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """[S, W, ...] -> [1, T, ...]."""
        return padded.flatten(0, 1).index_select(0, self.place.to(padded.device)).unsqueeze(0)


def read_packed_layout(vision_mask: torch.Tensor, bounds: torch.Tensor) -> VisionLayout:
    """Describe a packed batch as a padded one, on the device of `vision_mask`. The one host read of its prefill.

    Args:
        vision_mask: bool [1, T], true at vision tokens.
        bounds: int [S + 1], `cu_seq_lens`: 0, where the other samples begin, T.

    Raises:
        ValueError: more than one row, or bounds that do not rise from 0 to T.
    """
    rows, tokens = vision_mask.shape
    if rows != 1:
        raise ValueError(f"input_ids: expected one row of packed samples with cu_seq_lens_q, got {rows}")
    host = torch.cat((vision_mask.flatten().to(torch.int32), bounds.to(vision_mask.device, torch.int32))).cpu()
    vision, ends = host[:tokens].bool(), host[tokens:].tolist()
    lengths = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    if not lengths or ends[0] != 0 or ends[-1] != tokens or min(lengths) < 1:
        raise ValueError(f"cu_seq_lens_q: expected bounds that rise from 0 to {tokens}, got {ends}")
    return _layout_of_row(vision, lengths).to(vision_mask.device)


def _layout_of_row(vision: torch.Tensor, lengths: list[int]) -> VisionLayout:
    """The padded layout, on the CPU, of samples of these lengths in a row of vision tokens, bool [T]."""
    padded = torch.nn.utils.rnn.pad_sequence(list(vision.split(lengths)), batch_first=True)
    valid = torch.arange(padded.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return VisionLayout.from_mask(padded, valid)


def read_masked_layout(vision_mask: torch.Tensor, mask: CallerMask, past: int) -> tuple[VisionLayout, CallerMask, bool]:
    """Describe a batch to be pruned whose attention mask says of every pair of tokens whether one sees the other.

    The one host read of its prefill.

    Args:
        vision_mask: bool [B, n], true at vision tokens.
        mask: a mask of pairs.
        past: tokens in front of the n.

    Returns:
        (layout on the device of `vision_mask`; the mask, without pairs where each sample's attention is causal;
        whether the layout is that of several samples in one row).

    Raises:
        ValueError: a mask under which it is not clear what the asking token attends to, or where samples begin.
    """
    device, valid = vision_mask.device, mask.valid
    starts = torch.zeros_like(valid) if past else mask.sample_starts(valid)
    is_causal, keys = mask.as_keys(past, starts)
    flags = (flag.expand_as(valid) for flag in (is_causal, mask.is_biased))
    read = torch.stack([vision_mask, *(row.to(device) for row in (valid, starts, *flags))])
    vision, valid, starts, is_causal, biased = read.cpu()
    if mask.pairs.shape[1] != 1:
        raise ValueError(
            f"attention_mask: expected one mask for all heads where tokens are pruned, got {mask.pairs.shape[1]}"
        )
    if biased.any():
        raise ValueError(
            "attention_mask: expected 0 or the lowest number where tokens are pruned, got other weights in between"
        )
    samples = starts.sum(1).tolist()
    if max(samples) <= 1:
        mask = CallerMask(mask.valid, keys, None) if is_causal.all() else mask
        return VisionLayout.from_mask(vision, valid).to(device), mask, False
    if len(samples) > 1 or not valid.all():
        raise ValueError(
            "attention_mask: expected one row without padding where a mask separates samples, got a batch of "
            f"{len(samples)} rows with {samples} samples"
        )
    begins = starts[0].nonzero().flatten().tolist()
    ends = [*begins[1:], vision.shape[1]]
    lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
    mask = CallerMask(None, None, None) if is_causal.all() else mask
    return _layout_of_row(vision[0], lengths).to(device), mask, True


def read_positioned_layout(vision_mask: torch.Tensor, positions: torch.Tensor) -> tuple[VisionLayout, bool]:
    """Describe a row whose position ids may begin anew, each time with another sample. Its prefill's one host read.

    Args:
        vision_mask: bool [1, n], true at vision tokens.
        positions: int [1, n].

    Returns:
        (layout on the device of `vision_mask`, whether it is that of several samples).
    """
    device = vision_mask.device
    vision, positions = torch.stack((vision_mask.long(), positions.to(device))).cpu()
    begins = [0, *((positions[0].diff() != 1).nonzero().flatten() + 1).tolist()]
    if len(begins) == 1:
        return VisionLayout.from_mask(vision.bool()).to(device), False
    ends = [*begins[1:], vision.shape[1]]
    lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
    return _layout_of_row(vision[0].bool(), lengths).to(device), True


def pack_batch(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A padded batch, as a processor returns it, without its padding: inputs of one prefill that is not decoded from.

    For `attn_implementation="flash_attention_2"`; sdpa and eager compute the same, at the cost of attention between all
    tokens of the row. Reads the attention mask.

    Args:
        inputs: `input_ids` and `attention_mask`, int [B, n]; entries of the same shape are packed too, and others
            (`pixel_values`) handed on. Models with positions in time, height and width ask for `position_ids`
            [3 or 4, B, n], as `model.model.get_rope_index` returns them (text first, where there are 4).

    Returns:
        `input_ids` int64 [1, T], `position_ids` [1, T] or [4, 1, T]; `cu_seq_lens_q`, `cu_seq_lens_k` int32 [B + 1];
        `max_length_q`, `max_length_k`; `use_cache` False; the other entries. Sample b's last token is number
        `cu_seq_lens_q[b + 1] - 1` of the row.

    Raises:
        ValueError: a sample without tokens.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    lengths = mask.sum(1).tolist()
    if min(lengths) < 1:
        raise ValueError(f"attention_mask: expected tokens in every sample, got lengths {lengths}")
    positions = torch.cat([torch.arange(length) for length in lengths]).to(ids.device).unsqueeze(0)
    given = inputs.get("position_ids")
    if given is not None and given.dim() == 3:
        positions = torch.cat((positions.unsqueeze(0), given[-3:, mask].unsqueeze(1)))
    bounds = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=ids.device)
    others = {name: value for name, value in inputs.items() if name not in ("attention_mask", "position_ids")}
    of_tokens = {n: v[mask].unsqueeze(0) for n, v in others.items() if getattr(v, "shape", None) == mask.shape}
    return {
        **others,
        **of_tokens,
        "position_ids": positions,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }
