"""VisionLayout and prune_plan against loops over tokens, and against the C++ reference."""

import math
from dataclasses import astuple

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmoe_kernels import PrunePlan, VisionLayout, prune_plan

TEXT, VISION, PADDING = 0, 1, 2
# round ones reach the bounds of the plan exactly
ratios = st.sampled_from([1 / 3, 0.5, 1.0]) | st.floats(0, 1, allow_subnormal=False)


@st.composite
def batches(draw):
    """Rows of TEXT, VISION and PADDING, all of one width and padded on one side; and that side."""
    side = draw(st.sampled_from(["left", "right"]))
    samples = draw(st.lists(st.lists(st.sampled_from([TEXT, VISION]), max_size=14), min_size=1, max_size=4))
    width = max(map(len, samples)) + draw(st.integers(0, 2))
    pads = [[PADDING] * (width - len(sample)) for sample in samples]
    rows = [pad + sample if side == "left" else sample + pad for pad, sample in zip(pads, samples, strict=True)]
    return rows, side


def build(rows, *, dtype=torch.bool, vision_at_padding=False):
    tokens = torch.tensor(rows).view(len(rows), -1)
    vision = tokens == VISION
    if vision_at_padding:
        vision |= tokens == PADDING
    return VisionLayout.from_mask(vision, (tokens != PADDING).to(dtype))


def find_runs(row):
    """Positions of each run of consecutive vision tokens."""
    runs = []
    for position, token in enumerate(row):
        if token == VISION:
            if position == 0 or row[position - 1] != VISION:
                runs.append([])
            runs[-1].append(position)
    return runs


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches(), st.integers(1, 5), st.booleans())
def test_layout_of_a_padded_batch(batch, window, vision_at_padding):
    check_layout(*batch, window, vision_at_padding)


def check_layout(rows, side, window, vision_at_padding):
    layout = build(rows, vision_at_padding=vision_at_padding)
    assert (layout.batch_size, layout.width) == (len(rows), len(rows[0]))
    assert layout.lengths == tuple(sum(t != PADDING for t in row) for row in rows)
    assert layout.n_vision == tuple(row.count(VISION) for row in rows)
    assert layout.is_full == all(PADDING not in row for row in rows)
    # rows that are all padding or none at all tell nothing about the side
    if any(0 < length < layout.width for length in layout.lengths):
        assert layout.padding_side == side
    assert layout.vision_mask.tolist() == [[t == VISION for t in row] for row in rows]
    assert layout.valid_mask.tolist() == [[t != PADDING for t in row] for row in rows]
    for row, start, length in zip(rows, layout.starts, layout.lengths, strict=True):
        assert PADDING not in row[start : start + length]

    runs = [find_runs(row) for row in rows]
    assert layout.runs == tuple(tuple(map(len, sample)) for sample in runs)
    ranks = [[-1] * len(row) for row in rows]
    for sample, rank in zip(runs, ranks, strict=True):
        for run in sample:
            for i, position in enumerate(run):
                rank[position] = i
    assert layout.run_rank.dtype == torch.int32
    assert layout.run_rank.tolist() == ranks
    windows = tuple(
        tuple(tuple(run[i : i + window]) for run in sample for i in range(0, len(run), window)) for sample in runs
    )
    assert layout.windows(window) == windows


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches(), ratios.filter(lambda r: r > 0), ratios, st.integers(1, 5))
def test_counts_of_a_batch_are_the_plans_of_its_samples(batch, keep_ratio, merge_ratio, window):
    check_counts(batch[0], keep_ratio, merge_ratio, window)


def check_counts(rows, keep_ratio, merge_ratio, window):
    layout = build(rows)
    counts = layout.prune_counts(keep_ratio, merge_ratio, window)
    plans = [prune_plan(runs, keep_ratio, merge_ratio, window) for runs in layout.runs]
    windows = [len(sample) for sample in layout.windows(window)]
    assert counts.targets == tuple(plan.target for plan in plans)
    bounded = [max(0, min(most, w - 1)) for most, w in zip(counts.most_merged, windows, strict=True)]
    assert bounded == [plan.merged for plan in plans]
    text = [length - vision for length, vision in zip(layout.lengths, layout.n_vision, strict=True)]
    assert counts.lengths == tuple(t + plan.target for t, plan in zip(text, plans, strict=True))
    assert counts.width == max(counts.lengths)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), max_size=5), ratios.filter(lambda r: r > 0), ratios, st.integers(1, 6))
def test_plan(runs, keep_ratio, merge_ratio, window):
    check_plan(runs, keep_ratio, merge_ratio, window)


def check_plan(runs, keep_ratio, merge_ratio, window):
    plan = prune_plan(runs, keep_ratio, merge_ratio, window)
    assert astuple(plan) == oracle.prune_plan(runs, keep_ratio, merge_ratio, window)
    n_vis = sum(runs)
    assert 0 <= plan.merged <= plan.target <= n_vis
    # whichever windows merge, enough tokens are left outside them
    sizes = sorted((min(window, run - i) for run in runs for i in range(0, run, window)), reverse=True)
    if plan.target < n_vis:
        assert plan.merged < len(sizes)
        assert n_vis - sum(sizes[: plan.merged]) >= plan.target - plan.merged


@pytest.mark.parametrize(
    ("runs", "keep_ratio", "merge_ratio", "window", "expected"),
    [
        ([], 0.5, 0.5, 3, (0, 0)),
        ([1], 0.5, 0.5, 3, (1, 0)),  # nothing to prune
        ([10], 1.0, 1.0, 3, (10, 0)),
        ([10], 0.01, 0.5, 3, (1, 0)),  # one always survives
        ([6], 0.34, 1.0, 3, (2, 1)),  # 2 windows: only one may merge
        ([3, 3, 3, 3], 0.75, 1.0, 3, (9, 1)),  # 12 - 9 tokens too many: room for one merge
        ([5, 5], 0.5, 1.0, 1, (5, 5)),  # a window of one merges into itself
        ([1792], 0.5 ** (1 / 3), 0.025, 3, (1422, 35)),  # InternVL3.5, 7 tiles of 256
    ],
)
def test_plan_by_hand(runs, keep_ratio, merge_ratio, window, expected):
    assert prune_plan(runs, keep_ratio, merge_ratio, window) == PrunePlan(*expected)


def test_layout_without_attention_mask():
    layout = VisionLayout.from_mask(torch.tensor([[True, False, True, True], [False, False, False, False]]))
    assert layout.lengths == (4, 4) and layout.n_vision == (3, 0)
    assert layout.runs == ((1, 2), ()) and layout.is_full
    assert layout.starts == (0, 0)
    assert layout.to(torch.device("cpu")) is layout


def test_vision_across_a_whole_row_is_one_run_per_sample():
    layout = VisionLayout.from_mask(torch.ones(2, 7, dtype=torch.bool))
    assert layout.runs == ((7,), (7,))
    assert layout.windows(3) == (((0, 1, 2), (3, 4, 5), (6,)),) * 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integer_attention_masks(dtype):
    rows = [[PADDING, TEXT, VISION], [VISION, VISION, TEXT]]
    assert build(rows, dtype=dtype).runs == ((1,), (2,))
    assert build(rows, dtype=dtype).padding_side == "left"


@pytest.mark.parametrize(
    "valid",
    [
        [[1, 0, 1], [1, 1, 1]],  # inside
        [[0, 1, 0], [1, 1, 1]],  # both sides
        [[0, 1, 1], [1, 1, 0]],  # a different side per sample
    ],
)
def test_padding_that_is_no_padding(valid):
    with pytest.raises(ValueError, match="attention_mask"):
        VisionLayout.from_mask(torch.ones(2, 3, dtype=torch.bool), torch.tensor(valid))


@pytest.mark.parametrize(
    ("vision", "attention", "error", "name"),
    [
        ([[True]], None, TypeError, "vision_mask"),
        (torch.ones(2, 3), None, TypeError, "vision_mask"),
        (torch.ones(3, dtype=torch.bool), None, ValueError, "vision_mask"),
        (torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool), ValueError, "attention_mask"),
        (torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3), TypeError, "attention_mask"),
    ],
)
def test_bad_masks(vision, attention, error, name):
    with pytest.raises(error, match=name):
        VisionLayout.from_mask(vision, attention)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        (([0], 0.5, 0.1, 3), ValueError, r"runs\[0\]"),
        (([3, 2.0], 0.5, 0.1, 3), TypeError, r"runs\[1\]"),
        (([3], 0.0, 0.1, 3), ValueError, "keep_ratio"),
        (([3], 1.5, 0.1, 3), ValueError, "keep_ratio"),
        (([3], math.nan, 0.1, 3), ValueError, "keep_ratio"),
        (([3], "0.5", 0.1, 3), TypeError, "keep_ratio"),
        (([3], 0.5, -0.1, 3), ValueError, "merge_ratio"),
        (([3], 0.5, 1.1, 3), ValueError, "merge_ratio"),
        (([3], 0.5, 0.1, 0), ValueError, "window"),
        (([3], 0.5, 0.1, 3.0), TypeError, "window"),
    ],
)
def test_bad_plans(arguments, error, name):
    with pytest.raises(error, match=name):
        prune_plan(*arguments)


def test_bad_window():
    with pytest.raises(ValueError, match="window"):
        build([[TEXT, VISION]]).windows(0)
