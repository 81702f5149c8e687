"""Which tokens a caller's attention mask makes valid, and what is left of a mask of every pair of tokens."""

from dataclasses import dataclass
from typing import Any

import torch

from fastmmoe.families.kinds import CHUNKED, FULL, RECURRENT, SLIDING

# in an additive mask; people write -1e4, which bfloat16 rounds
HIDDEN = -9000.0


@dataclass(frozen=True)
class CallerMask:
    """A forward's attention mask as its caller gave it.

    Attributes:
        valid: bool [B, n], which of the new tokens are no padding; None: all of them.
        keys: int or bool [B, past + n], validity of past and new tokens; None: all are valid, or `pairs` says it.
        pairs: [B or 1, heads or 1, n, keys], bool or additive: which keys each new token sees; None where attention is
            causal.
    """

    valid: torch.Tensor | None
    keys: torch.Tensor | None
    pairs: torch.Tensor | None

    @classmethod
    def of(cls, mask: Any, past: int, new: int, batch: int) -> "CallerMask":
        """Read the argument `attention_mask` of a text model: None, 2D, 4D, or a dict of them by kind of layer.

        Raises:
            TypeError, ValueError: a mask of another kind.
        """
        if isinstance(mask, dict):
            # of layers that see all in front of them
            narrow = (SLIDING, CHUNKED, *RECURRENT)
            mask = mask[FULL] if FULL in mask else next(one for kind, one in mask.items() if kind not in narrow)
        if mask is None:
            return cls(None, None, None)
        if not isinstance(mask, torch.Tensor):
            raise TypeError(f"attention_mask: expected a tensor or None, got {type(mask).__name__}")
        if mask.dim() == 2:
            # one for a static cache is longer than what the cache will hold
            mask = mask[:, : past + new]
            return cls(mask[:, -new:].bool(), mask, None)
        if mask.dim() != 4 or mask.shape[2] != new or mask.shape[3] < past + new or mask.shape[0] not in (1, batch):
            raise ValueError(
                f"attention_mask: expected [{batch}, {past + new}] or [{batch}, 1, {new}, {past + new}], "
                f"got {list(mask.shape)}"
            )
        if mask.stride(1) == 0:
            mask = mask[:, :1]  # one mask, shown to every head
        return cls(_valid_tokens(_sees(mask, past, new), past).expand(batch, -1), None, mask)

    @property
    def is_biased(self) -> torch.Tensor:
        """bool, on the mask's device: some key that is seen has a weight of its own, which a ranking would not know."""
        if self.pairs is None or self.pairs.dtype == torch.bool:
            return torch.zeros((), dtype=torch.bool)
        return (_visible(self.pairs) & (self.pairs != 0)).any()

    def as_keys(self, past: int, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(whether a mask of pairs is causal attention to some keys, bool; those keys, bool [B, past + n]).

        Args:
            starts: bool [B, n], where samples begin that see nothing of each other.
        """
        valid = self.valid
        sees = _sees(self.pairs, past, valid.shape[1]).expand(len(valid), -1, -1)
        old = (sees[..., :past] & valid.unsqueeze(-1)).any(1)
        keys = torch.cat((old, valid), 1)
        place = torch.arange(keys.shape[1], device=keys.device)
        causal = keys.unsqueeze(1) & (place <= place[past:].unsqueeze(-1))
        if not past:
            sample = starts.cumsum(1)
            causal = causal & (sample.unsqueeze(1) == sample.unsqueeze(2))
        return ((sees == causal) | ~valid.unsqueeze(-1)).all(), keys

    def sample_starts(self, valid: torch.Tensor) -> torch.Tensor:
        """bool [B, n]: where samples begin that stand behind one another in a row and see nothing of each other.

        Each begins behind what no earlier token sees, and sees nothing of what stands in front. Not for masks over a
        past.

        Args:
            valid: bool [B, n].
        """
        n = valid.shape[1]
        sees = _sees(self.pairs, 0, n).expand(valid.shape[0], -1, -1) & valid.unsqueeze(1)
        place = torch.arange(n, device=sees.device)
        first = torch.where(sees, place, n).amin(-1).masked_fill(~valid, n)  # [B, n], of the keys each token sees
        last = torch.where(sees, place, -1).amax(-1).masked_fill(~valid, -1)
        nothing_before = first.flip(1).cummin(1).values.flip(1) >= place
        unseen_before = torch.nn.functional.pad(last.cummax(1).values[:, :-1], (1, 0), value=-1) < place
        return valid & nothing_before & unseen_before


def _visible(pairs: torch.Tensor) -> torch.Tensor:
    """bool like a mask of pairs: what is not masked out, be it by the lowest number or by one that leaves nothing."""
    return pairs if pairs.dtype == torch.bool else pairs > HIDDEN


def _sees(pairs: torch.Tensor, past: int, new: int) -> torch.Tensor:
    """bool [B or 1, n, past + n]: whether a token sees a key, with any of its heads."""
    visible = _visible(pairs[..., : past + new])
    return visible[:, 0] if visible.shape[1] == 1 else visible.any(1)


def _valid_tokens(sees: torch.Tensor, past: int) -> torch.Tensor:
    """bool [B or 1, n]: which tokens of a mask of pairs are no padding.

    Padding stands on a side. A padding token sees nothing, or, where attention could not bear that, only itself, or
    everything, also what comes later; or it does not see itself. And no other token sees it.
    """
    new = sees[..., past:]
    itself = new.diagonal(dim1=1, dim2=2)
    place = torch.arange(new.shape[1], device=new.device)
    everything = sees.all(-1) & (place < new.shape[1] - 1)
    odd = ~itself | (sees.sum(-1) <= 1) | everything
    unseen = odd & ~(new & ~odd.unsqueeze(-1)).any(1)
    left = unseen.long().cumprod(1).bool()
    right = unseen.flip(1).long().cumprod(1).flip(1).bool()
    # a token alone in its row is none
    return torch.where(unseen.all(1, keepdim=True), itself, ~(left | right))


def cut_pairs(pairs: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, keys: int) -> torch.Tensor:
    """A mask of pairs for fewer tokens.

    Args:
        pairs: [B or 1, heads or 1, n, *], bool or additive.
        rows: int64 [B, n'], which tokens ask; -1 at padding, which sees everything: attention to nothing is NaN.
        columns: int64 [B, k], which keys are left; -1 at padding, which nobody sees.
        keys: how many keys the attention has, k or more; the others are not filled yet.

    Returns:
        [B, heads or 1, n', keys], of the same dtype.
    """
    hidden = False if pairs.dtype == torch.bool else torch.finfo(pairs.dtype).min
    batch, heads = rows.shape[0], pairs.shape[1]
    pairs = pairs.expand(batch, -1, -1, -1)
    at = rows.clamp_min(0)[:, None, :, None].expand(-1, heads, -1, pairs.shape[3])
    cut = pairs.gather(2, at)
    at = columns.clamp_min(0)[:, None, None, :].expand(-1, heads, rows.shape[1], -1)
    cut = cut.gather(3, at).masked_fill((columns < 0)[:, None, None], hidden)
    cut = torch.nn.functional.pad(cut, (0, keys - columns.shape[1]), value=hidden)
    return cut.masked_fill((rows < 0)[:, None, :, None], True if pairs.dtype == torch.bool else 0.0)


def visible_pairs(pairs: torch.Tensor) -> torch.Tensor:
    """bool [B, heads or 1, n, keys] of a mask of pairs."""
    return _visible(pairs)
