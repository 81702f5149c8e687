"""Tables of a study: their columns, and those of results that were measured before a column was there."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fastmmoe.cost.devices import DEVICES
from fastmmoe.study import methods, tables
from fastmmoe.study.plots import draw_plots
from fastmmoe.study.results import read_parts
from fastmmoe.study.study import PARTS, Study

RESULTS = Path(__file__).parents[2] / "bench/results/quality"


def cells(text, title):
    """First column -> the others, of the table under a title."""
    lines = text.split(f"| {title} |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=20), st.tuples(st.just(9), st.integers(0, 5))
)
def test_the_frontier_is_what_no_row_beats(drawn, dense):
    rows = [{"flops_ratio": cost, "accuracy": right, "config": {}} for cost, right in drawn]
    rows.append({"flops_ratio": dense[0], "accuracy": dense[1], "config": None})
    first, *others = tables.frontier(rows)
    assert first is rows[-1]
    assert sorted((row["flops_ratio"] for row in others), reverse=True) == [row["flops_ratio"] for row in others]

    def beats(row, other):
        """At as few FLOPs it answers better, or at fewer as well."""
        left, right = ((one["accuracy"], -one["flops_ratio"]) for one in (row, other))
        return left != right and left[0] >= right[0] and left[1] >= right[1]

    unbeaten = {(row["flops_ratio"], row["accuracy"]) for row in rows if not any(beats(one, row) for one in rows)}
    assert {(row["flops_ratio"], row["accuracy"]) for row in others} == unbeaten - {dense}
    assert len(others) == len(unbeaten - {dense})  # of equals one


def test_rows_and_tables_have_calculated_times(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "RETENTIONS", (0.5, 0.25))
    Study(replace(settings, n=6), tmp_path, ["methods", "timing", "budget"]).run()
    tables.write_tables(tmp_path)
    parts, text = read_parts(tmp_path, PARTS), (tmp_path / "tables.md").read_text()
    times = {methods.key_of(row): row for row in parts["timing"]["rows"]}
    for row in parts["methods"]["rows"]:
        assert list(row["time_ratio_predicted"]) == list(DEVICES)
        assert row["time_ratio_predicted"] == times[methods.key_of(row)]["time_ratio_predicted"]
    for part in ("methods", "timing", "budget"):
        with (tmp_path / f"{part}.csv").open() as file:
            last = list(csv.DictReader(file))[-1]
        found = {name: float(last[f"time_ratio_predicted:{name}"]) for name in DEVICES}
        row = parts[part]["rows"][-1]
        assert all(abs(found[name] - ratio) < 1e-4 for name, ratio in row["time_ratio_predicted"].items())

    row = next(row for row in parts["methods"]["rows"] if (row["placement"], row["retention"]) == ("early", 0.25))
    (first, *_), key = DEVICES, methods.key_of(row)
    costs = (
        f"{row['flops_ratio']:.2f}; {first} {row['time_ratio_predicted'][first]:.2f}; {times[key]['time_ratio']:.2f}"
    )
    assert cells(text, "pruned at 1 (early) | 0.5 left")[row["method"]][1].endswith(f"({costs})")
    assert f"{first}: calculated time of one prompt's prefill there / dense" in text

    budget = next(row for row in parts["budget"]["rows"] if row["reduction_layer"] == 2)
    costs = f"{budget['flops_ratio']:.2f}; {first} {budget['time_ratio_predicted'][first]:.2f}"
    assert cells(text, "l_v | B = 4")["2"] == [f"{budget['accuracy']:.3f} ± {budget['standard_error']:.3f} ({costs})"]


def test_types_are_columns(settings, tmp_path, monkeypatch):
    """Of every method at every retention, all experts, and of every budget."""
    monkeypatch.setattr(methods, "RETENTIONS", (0.5, 0.25))
    Study(replace(settings, n=6), tmp_path, ["methods", "budget"]).run()
    tables.write_tables(tmp_path)
    parts, text = read_parts(tmp_path, PARTS), (tmp_path / "tables.md").read_text()
    rows = parts["methods"]["rows"]
    names = list(rows[0]["types"])
    assert len(names) == 6
    found = cells(text, f"pruned at 1 (early) | all | {' | '.join(names)}")
    expected = {"dense": rows[0]} | {
        f"{row['method']}, {row['retention']:g} left": row
        for row in rows
        if row["placement"] == "early" and row["vision_top_k"] is None
    }
    assert found == {
        label: [f"{share:.3f}" for share in (row["accuracy"], *row["types"].values())]
        for label, row in expected.items()
    }
    assert list(found)[1] == "FastMMoE, 0.5 left" and len(found) == 1 + 2 * 6
    found = cells(text, f"experts | all | {' | '.join(names)}")
    assert list(found) == ["dense", *(f"B = 4 from {layer} on" for layer in (0, 1, 2))]


def test_results_without_the_columns_are_read_and_gone_on_with(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "RETENTIONS", (0.5,))
    Study(settings, tmp_path, ["methods"]).run()
    path = tmp_path / "methods.json"
    whole = json.loads(path.read_text())
    older = [{name: value for name, value in row.items() if name != "time_ratio_predicted"} for row in whole["rows"]]
    path.write_text(json.dumps(whole | {"complete": False, "rows": older[:5]}))
    Study(settings, tmp_path, ["methods"], resume=True).run()
    assert read_parts(tmp_path, ["methods"])["methods"]["rows"] == older[:5] + whole["rows"][5:]
    tables.write_tables(tmp_path)
    draw_plots(tmp_path)
    found = cells((tmp_path / "tables.md").read_text(), "not pruned | all left")
    assert found["dense"][0].endswith("(1.00)") and "; h100 " in found["fewer experts only"][0]


def test_the_results_at_hand_are_read(tmp_path):
    """What they say, and nothing that they do not have."""
    for source in RESULTS.glob("*.json"):
        shutil.copy(source, tmp_path)
    parts = read_parts(tmp_path, PARTS)
    assert {"methods", "heatmap", "ablations", "chosen", "timing"} <= set(parts)
    for part in ("methods", "heatmap", "ablations", "chosen", "timing"):
        keys = {methods.key_of(row) for row in parts[part]["rows"]}
        assert len(keys) == len(parts[part]["rows"])
    tables.write_tables(tmp_path)
    assert (tmp_path / "comparisons.csv").read_bytes() == (RESULTS / "comparisons.csv").read_bytes()
    text, before = (tmp_path / "tables.md").read_text(), (RESULTS / "tables.md").read_text()
    assert set(before.splitlines()) - set(text.splitlines()) == set()
    assert "## types" in text and "## budget" in text and "h100" in text
