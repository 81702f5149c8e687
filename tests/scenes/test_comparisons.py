"""What `bench/quality/` compares beyond the study: several models, schedules of equal cost, shapes of windows."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from quality.schedules import candidates, cost
from quality.seeds import compare
from quality.windows import SIDE, BlockConfig

from fastmmoe.methods import FastMMoEConfig
from fastmmoe.methods.method import StageInput
from fastmmoe.scenes.tokenizer import VISION_TOKENS
from fastmmoe.study.methods import Method
from fastmmoe.study.study import Session, Settings
from fastmmoe_kernels import VisionLayout


def study(**right: str) -> dict:
    """A study's `methods` part, its rows' answers as given."""
    place = {"placement": "early", "retention": 0.5, "vision_top_k": None, "flops_ratio": 0.6, "n": 4}
    return {
        "rows": [
            {"method": method, "accuracy": answers.count("1") / len(answers), "right": answers} | place
            for method, answers in right.items()
        ]
    }


def test_a_lead_over_several_models_by_hand():
    """Four questions, two models: by question, the lead is 1, 1/2, 0 and 0."""
    ours, theirs = compare(
        [study(FastMMoE="1110", FastV="0010"), study(FastV="0110", FastMMoE="1110")],
    )
    assert "lead" not in ours and ours["accuracies"] == [0.75, 0.75]
    assert theirs["method"] == "FastV" and theirs["accuracy"] == 0.375
    assert theirs["leads"] == [0.5, 0.25] and theirs["lead"] == 0.375
    # deviations 5/8, 1/8, -3/8, -3/8 of three degrees of freedom
    assert theirs["standard_error"] == pytest.approx(((25 + 1 + 9 + 9) / 64 / 3 / 4) ** 0.5)


def test_candidates_spend_the_budget_and_no_more():
    session = Session(Settings(n=1, dev_n=1))
    budget = cost(session, FastMMoEConfig(prune_layers=(1, 2, 3), retention=0.25, vision_top_k=2))
    found = candidates(session, budget, [(2, 2), (1, 1)])
    assert len(found) > 20
    for config in found:
        assert cost(session, config) <= budget
        first, *later = config.keep_ratios
        assert all(0.01 <= ratio <= first for ratio in later)
        # one vision token more at every stage would be too many
        more = dataclasses.replace(config, keep_ratios=tuple(min(1.0, ratio + 0.02) for ratio in config.keep_ratios))
        assert cost(session, more) > budget or config.keep_ratios[0] > 0.98


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("retention", "settings"),
    [
        (0.5, "vision_top_k=1, reduction_layer=2, prune_layers=(3, 5), retention=0.342, steepness=0.6"),
        (0.25, "vision_top_k=1, reduction_layer=1, prune_layers=(2, 4, 6), retention=0.084, steepness=0.6"),
    ],
)
def test_the_schedules_of_the_study_are_those_that_were_tested(retention, settings):
    study = " ".join((ROOT / "docs/results/study.md").read_text().split())
    assert settings in study
    said = eval(f"FastMMoEConfig({settings})")
    results = json.loads((ROOT / "bench/results/quality/schedules.json").read_text())["results"]
    found = next(one for one in results if one["retention"] == retention)["test"]["layers and experts"]
    tested = FastMMoEConfig.from_dict(found["config"])
    assert (said.prune_layers, said.vision_top_k, said.reduction_layer) == (
        tested.prune_layers, tested.vision_top_k, tested.reduction_layer,
    )  # fmt: skip
    ours = theirs = VISION_TOKENS
    for stage in range(len(said.prune_layers)):
        ours, theirs = said.vision_left(stage, ours), tested.vision_left(stage, theirs)
        assert ours == theirs
    assert f"gains {found['lead']:.3f} +- {found['standard_error']:.3f}" in study


def test_the_rankings_of_the_study_are_those_that_were_tested():
    study = " ".join((ROOT / "docs/results/study.md").read_text().split())
    results = json.loads((ROOT / "bench/results/quality/windows.json").read_text())["results"]

    def bullet(begin: str) -> str:
        return study[study.index(begin) :].split(" - ")[0]

    def said(row: dict) -> str:
        return f"{row['lead']:.3f} +- {row['standard_error']:.3f}"

    ours = results["redundancy"]["official_windows"]
    assert all(said(row) in bullet("**Better than the paper's default ranking") for row in ours)
    losses = [lead for row in ours for lead in row["leads"] if lead < 0]
    assert len(losses) == 1 and f"a loss, of {-losses[0]:.4f}" in study
    *stages, _, single = results["routing similarity"]["official_windows"]
    text = bullet("The paper's other ranking")
    assert all(said(row) in text for row in stages) and f"loses {said(single | {'lead': -single['lead']})}" in text
    for name in results:
        assert f"({said(results[name]['best_windows'])})" in bullet("Nor does the shape of windows")


def windows_by_hand(left: list[int], block: tuple[int, int], regroup: bool) -> list[list[int]]:
    """The picture's tokens that are left, cut into windows."""
    rows, columns = block
    corners = [(row, column) for row in range(0, SIDE, rows) for column in range(0, SIDE, columns)]
    blocks = [
        [row * SIDE + column for row in range(SIDE) for column in range(SIDE)
         if top <= row < top + rows and start <= column < start + columns and row * SIDE + column in left]
        for top, start in corners
    ]  # fmt: skip
    if not regroup:
        return [tokens for tokens in blocks if tokens]
    row = sum(blocks, [])
    return [row[start : start + rows * columns] for start in range(0, len(row), rows * columns)]


def stage_by_hand(
    values: dict[int, float], seen: dict[int, float], windows: list[list[int]], target: int
) -> tuple[dict[int, float], set[int]]:
    """Half of the survivors are means of the least attended windows, the others the most attended tokens."""
    count = min(int(target * 0.5), (len(values) - target) // (max(map(len, windows)) - 1 or 1), len(windows) - 1)
    windows = sorted(windows, key=lambda tokens: sum(seen[token] for token in tokens) / len(tokens))
    merged = {tokens[0]: sum(values[token] for token in tokens) / len(tokens) for tokens in windows[:count]}
    others = sorted(sum(windows[count:], []), key=lambda token: -seen[token])
    found = merged | {token: values[token] for token in others[: target - count]}
    return dict(sorted(found.items())), set(merged)


@pytest.mark.parametrize("regroup", [True, False])
@pytest.mark.parametrize("block", [(2, 2), (3, 2), (1, 3)])
def test_windows_that_are_blocks_of_the_picture(block, regroup):
    """Two stages on two samples, one of them padded, against lists."""
    rng = torch.Generator().manual_seed(0)
    config = BlockConfig(
        prune_layers=(1, 2), keep_ratios=(0.6, 0.5), strategy="dynamic_attention", merge_method="mean",
        merge_ratio=0.5, block=block, regroup=regroup,
    )  # fmt: skip
    fronts, width, behind = (3, 5), 108, 3  # other tokens in front of the picture; the first sample has two of padding
    vision, valid = torch.zeros(2, width, dtype=torch.bool), torch.zeros(2, width, dtype=torch.bool)
    for sample in range(2):
        vision[sample, width - behind - VISION_TOKENS : width - behind] = True
        valid[sample, width - behind - VISION_TOKENS - fronts[sample] :] = True
    layout, source = VisionLayout.from_mask(vision, valid), None
    prompt = hidden = torch.randn(2, width, 1, generator=rng)
    pruning = config.pruning()
    first = pruning.read_prompt(lambda: hidden, layout, 0)
    by_hand = [{token: hidden[sample, 5 + token].item() for token in range(VISION_TOKENS)} for sample in range(2)]
    for stage, target in enumerate((60, 30)):
        seen = torch.rand(2, layout.width, generator=rng)
        pruned = pruning.prune(
            StageInput(
                stage=stage, hidden=hidden, residual=-hidden, layout=layout, seen=seen, prompt=first, source=source,
                gate_probs=lambda hidden: torch.ones(*hidden.shape[:2], 2),
            )
        )  # fmt: skip
        for sample, values in enumerate(by_hand):
            at = layout.vision_mask[sample].nonzero().flatten()
            attention = dict(zip(values, seen[sample, at].tolist(), strict=True))
            windows = windows_by_hand(list(values), block, regroup)
            expected, merged = stage_by_hand(values, attention, windows, target)
            by_hand[sample] = expected

            is_vision = pruned.layout.vision_mask[sample]
            positions = pruned.index[sample, is_vision] - 5
            assert positions.tolist() == list(expected)
            assert pruned.merged[sample, is_vision].tolist() == [token in merged for token in expected]
            torch.testing.assert_close(pruned.hidden[sample, is_vision, 0], torch.tensor(list(expected.values())))
            torch.testing.assert_close(pruned.residual, -pruned.hidden)
            assert pruned.layout.run_rank[sample, is_vision].tolist() == list(range(target))
            # all of the rest stays, and every token knows where it stood
            others = pruned.valid[sample] & ~is_vision
            assert int(others.sum()) == fronts[sample] + behind
            origin = pruned.index[sample, others]
            assert origin.tolist() == sorted(origin.tolist())
            torch.testing.assert_close(prompt[sample, origin, 0], pruned.hidden[sample, others, 0])
        hidden, layout, source = pruned.hidden, pruned.layout, pruned.index


def test_windows_in_raster_order_are_the_official_ones():
    session = Session(Settings(n=24, dev_n=1))
    place = {"prune_layers": (1, 3), "retention": 0.3, "merge_ratio": 0.3}
    official, blocks = (
        session.evaluate("test", Method("", configs=(config,)))
        for config in (FastMMoEConfig(**place), BlockConfig(**place, block=(1, 3)))
    )
    assert blocks["right"] == official["right"] and blocks["flops"] == official["flops"]
