"""Random padded batches for the tests of window scores and pruning."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from fastmmoe_kernels import VisionLayout


@dataclass
class Batch:
    """Inputs of a prune stage; everything but valid tokens' values is NaN."""

    hidden: torch.Tensor  # [B, n, H]
    residual: torch.Tensor  # [B, n, H]
    probs: torch.Tensor  # [B, n, E]
    importance: torch.Tensor  # [B, n]
    vision: torch.Tensor  # [B, n]
    valid: torch.Tensor  # [B, n]
    padding_side: str

    @property
    def layout(self) -> VisionLayout:
        return VisionLayout.from_mask(self.vision, self.valid)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        return Batch(
            self.hidden.to(device, dtype), self.residual.to(device, dtype), self.probs.to(device),
            self.importance.to(device), self.vision.to(device), self.valid.to(device), self.padding_side,
        )  # fmt: skip


def random_batch(
    seed: int,
    lengths: list[int],
    share: float,
    padding_side: str,
    experts: int = 6,
    features: int = 9,
    ties: bool = False,
) -> Batch:
    """Samples of the given lengths in which each token is a vision token with probability `share`.

    With `ties`, probabilities and importance take few values, so that windows and tokens tie exactly.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, n = len(lengths), max(lengths)
    position = torch.arange(n)
    length = torch.tensor(lengths).unsqueeze(1)
    valid = position >= n - length if padding_side == "left" else position < length
    vision = (torch.rand(batch, n, generator=generator) < share) & valid
    probs = torch.randn(batch, n, experts, generator=generator).softmax(-1)
    importance = torch.rand(batch, n, generator=generator)
    if ties:
        probs = torch.eye(experts)[torch.randint(0, 2, (batch, n), generator=generator)]
        importance = torch.randint(0, 3, (batch, n), generator=generator) / 4.0
    hidden = torch.randn(batch, n, features, generator=generator)
    residual = torch.randn(batch, n, features, generator=generator)
    for tensor in (hidden, residual):
        tensor[~valid] = float("nan")
    for tensor in (probs, importance):
        tensor[~vision] = float("nan")
    return Batch(hidden, residual, probs, importance, vision, valid, padding_side)


@st.composite
def batches(draw, ties: bool = False) -> Batch:
    """One to three samples of 1 to 24 tokens; few, many or only vision tokens; either padding side or none."""
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=3))
    return random_batch(
        draw(st.integers(0, 2**31)),
        lengths,
        draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        draw(st.sampled_from(["left", "right"])) if len(set(lengths)) > 1 else "left",
        experts=draw(st.sampled_from([2, 6, 9])),
        features=draw(st.sampled_from([1, 9, 40])),
        ties=ties,
    )
