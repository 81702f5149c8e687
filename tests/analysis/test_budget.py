"""The study's expert budgets: which, for which models, and that every prompt has its own."""

import json

import pytest
from model.tiny import tiny_internvl
from model.tiny_checkpoints import save
from PIL import Image

import fastmmoe
from fastmmoe.study import methods, tables
from fastmmoe.study.accuracy import evaluate
from fastmmoe.study.methods import Setting
from fastmmoe.study.plots import draw_plots
from fastmmoe.study.results import read_parts
from fastmmoe.study.study import Session, Settings, Study, session_of

from .test_accuracy import said


@pytest.mark.parametrize(
    ("num_experts", "top_k", "budgets"),
    [(128, 8, (64, 48, 32, 16)), (16, 4, (8, 6, 4)), (8, 4, (4,)), (60, 6, (30, 22, 15, 8))],
)
def test_budgets_are_shares_of_the_experts(num_experts, top_k, budgets):
    model = tiny_internvl(num_experts=num_experts, num_experts_per_tok=top_k)
    setting = Setting.of(model, 100)
    assert setting.budgets == budgets and setting.no_budget == ""
    for method in methods.budget_grid(setting):
        fastmmoe.enable(model, method.config)
        fastmmoe.disable(model)


def test_first_layers_are_early_a_quarter_and_half_way_up():
    for depth, layers in ((5, [0, 1, 2]), (8, [0, 2, 4]), (16, [0, 2, 4, 8])):
        grid = methods.budget_grid(Setting.of(tiny_internvl(num_hidden_layers=depth), 100))
        assert [method.config.reduction_layer for method in grid] == layers
        assert len({method.key for method in grid}) == len(layers)
        told = [method.describe() for method in grid]
        assert [(row["reduction_layer"], row["expert_budget"]) for row in told] == [(layer, 4) for layer in layers]
        assert [methods.key_of(json.loads(json.dumps(row))) for row in told] == [method.key for method in grid]


def test_tokens_that_take_all_experts_share_none():
    setting = Setting.of(tiny_internvl(num_experts=4), 100)
    assert setting.no_budget == "expert_budget=4: expected fewer than the model's 4 experts"
    assert setting.budgets == () and methods.budget_grid(setting) == []


def test_every_prompt_has_its_own_budget(settings, tmp_path):
    """Answers are those of a loop over single prompts, which batches do not give."""
    session = session_of(settings)
    method = methods.budget_grid(session.setting)[0]
    examples = session.questions("test")[0]
    right = [number % 3 != 0 for number in range(len(examples))]
    lines = []
    for number, (example, is_right) in enumerate(zip(examples, right, strict=True)):
        example.open_image().save(tmp_path / f"{number}.png")
        answer = said(session, example, method.config) if is_right else "no way"
        lines.append({"image": f"{number}.png", "question": example.question, "answer": answer})
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    asked = Session(Settings(model=settings.model, data=data, n=len(lines), batch=6, max_new_tokens=4))
    row = asked.evaluate("test", method)
    assert row["right"] == "".join("01"[is_right] for is_right in right)
    assert row["accuracy"] == pytest.approx(sum(right) / len(right)) and row["expert_budget"] == 4
    shared = evaluate(asked.model, asked.processor, *asked.questions("test"), method, max_new_tokens=4)
    assert shared["right"] != row["right"] and shared["flops_ratio"] == row["flops_ratio"] == 1.0


def test_resume_adds_what_is_missing(settings, tmp_path):
    Study(settings, tmp_path, ["budget"]).run()
    path = tmp_path / "budget.json"
    whole = json.loads(path.read_text())
    assert [row["method"] for row in whole["rows"]] == ["dense"] + ["expert budget"] * 3 and whole["complete"]
    marked = [dict(whole["rows"][2], accuracy=-1.0)]
    path.write_text(json.dumps(whole | {"complete": False, "rows": marked}))
    Study(settings, tmp_path, ["budget"], resume=True).run()
    again = json.loads(path.read_text())
    assert again == whole | {"rows": [*whole["rows"][:2], *marked, whole["rows"][3]]}


def test_a_part_that_is_empty_says_why(tmp_path):
    """A grouped gate: the study's other parts are as ever."""
    model = save("glm4v_moe", tmp_path)
    Image.new("RGB", (64, 40), "red").save(tmp_path / "red.png")
    data = tmp_path / "questions.jsonl"
    line = json.dumps({"image": "red.png", "question": "What is this?", "answer": "a cat"})
    data.write_text(f"{line}\n{line}\n")
    out = tmp_path / "out"
    settings = Settings(model=str(model), data=data, batch=2, max_new_tokens=2)
    assert "budget" in settings.default_parts
    Study(settings, out, ["routing", "budget"]).run()
    part = read_parts(out, ["budget"])["budget"]
    assert part["rows"] == [] and "chooses by groups" in part["why_empty"]
    Study(settings, out, ["routing", "budget"], resume=True).run()
    tables.write_tables(out)
    assert f"None: {part['why_empty']}." in (out / "tables.md").read_text()
    assert [path.name for path in draw_plots(out)] == ["routing.png"]
