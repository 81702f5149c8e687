"""Masks of pairs, against loops: which tokens are valid, where samples begin, what is left of a mask."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from fastmmoe.prefill.masks import CallerMask, cut_pairs


@st.composite
def rows(draw):
    """A row of samples one behind the other, and what surrounds it.

    Returns:
        (lengths of the samples; per sample whether its tokens see one another in both directions; tokens of padding
        on the left and on the right; what a padding token sees; whether the mask is additive).
    """
    lengths = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    both_ways = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    left, right = draw(st.sampled_from([(0, 0), (3, 0), (0, 2)]))
    padding_sees = draw(st.sampled_from(["nothing", "itself", "everything"]))
    return lengths, both_ways, left, right, padding_sees, draw(st.booleans())


def pairs_of(lengths, both_ways, left, right, padding_sees, additive):
    n = left + sum(lengths) + right
    sees = [[False] * n for _ in range(n)]
    begin = left
    for length, both in zip(lengths, both_ways, strict=True):
        for i in range(begin, begin + length):
            for j in range(begin, begin + length if both else i + 1):
                sees[i][j] = True
        begin += length
    for i in [*range(left), *range(n - right, n)]:
        for j in range(n):
            sees[i][j] = padding_sees == "everything" or (padding_sees == "itself" and i == j)
    mask = torch.tensor(sees)[None, None]
    return torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min) if additive else mask


@settings(deadline=None, max_examples=200)
@given(rows())
def test_valid_tokens_and_samples(row):
    lengths, both_ways, left, right, padding_sees, _ = row
    if right and padding_sees == "everything":
        return  # nothing tells such padding from a token that asks
    pairs = pairs_of(*row)
    n = pairs.shape[-1]
    mask = CallerMask.of(pairs, 0, n, 1)
    assert mask.valid[0].tolist() == [left <= i < n - right for i in range(n)]
    starts = mask.sample_starts(mask.valid)
    assert starts[0].nonzero().flatten().tolist() == [left + sum(lengths[:k]) for k in range(len(lengths))]
    is_causal, keys = mask.as_keys(0, starts)
    assert bool(is_causal) == (not any(both_ways))
    assert keys.tolist() == mask.valid.tolist()
    assert not mask.is_biased


@settings(deadline=None, max_examples=100)
@given(rows(), st.data())
def test_what_is_left_of_a_mask(row, data):
    pairs = pairs_of(*row)
    n = pairs.shape[-1]
    kept = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    index = torch.tensor([[-1, *kept]])
    cut = cut_pairs(pairs, index, index, len(kept) + 3)[0, 0]
    hidden = torch.finfo(torch.float32).min if pairs.is_floating_point() else False
    shown = 0.0 if pairs.is_floating_point() else True
    assert cut.shape == (len(kept) + 1, len(kept) + 3)
    assert cut[0].tolist() == [shown] * (len(kept) + 3)
    for a, i in enumerate(kept, 1):
        assert cut[a].tolist() == [hidden, *(pairs[0, 0, i, j].item() for j in kept), hidden, hidden]


def test_weights_of_their_own_are_found():
    pairs = torch.zeros(1, 1, 3, 3).masked_fill_(torch.ones(3, 3).triu(1).bool(), float("-inf"))
    assert not CallerMask.of(pairs, 0, 3, 1).is_biased
    pairs[0, 0, 2, 0] = -1.5
    assert CallerMask.of(pairs, 0, 3, 1).is_biased


def test_a_token_alone_between_samples_is_no_padding():
    pairs = pairs_of([3, 1, 2], [False] * 3, 2, 0, "itself", False)
    mask = CallerMask.of(pairs, 0, 8, 1)
    assert mask.valid[0].tolist() == [False] * 2 + [True] * 6
    assert mask.sample_starts(mask.valid)[0].nonzero().flatten().tolist() == [2, 5, 6]


def test_a_longer_mask_is_read_from_its_beginning():
    """For a static cache it has its length, and zeros or ones behind."""
    for behind in (0, 1):
        mask = CallerMask.of(torch.tensor([[0, 1, 1, 1, behind, behind]]), 1, 3, 1)
        assert mask.valid.tolist() == [[True] * 3] and mask.keys.tolist() == [[0, 1, 1, 1]]
