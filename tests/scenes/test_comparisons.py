"""What `bench/quality/` compares beyond the study: several models, and schedules of equal cost."""

import dataclasses
import json
from pathlib import Path

import pytest
from quality.schedules import candidates, cost
from quality.seeds import compare

from fastmmoe.analysis.study import Session, Settings
from fastmmoe.config import FastMMoEConfig
from fastmmoe.scenes.tokenizer import VISION_TOKENS


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
def test_the_schedules_of_the_readme_are_those_that_were_tested(retention, settings):
    readme = (ROOT / "README.md").read_text()
    assert settings in " ".join(readme.split())
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
    assert f"gains {found['lead']:.3f} +- {found['standard_error']:.3f}" in " ".join(readme.split())
