"""What `bench/quality/` compares beyond the study: several models, and schedules of equal cost."""

import dataclasses

import pytest
from quality.schedules import candidates, cost
from quality.seeds import compare

from fastmmoe.analysis.study import Session, Settings
from fastmmoe.config import FastMMoEConfig


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
