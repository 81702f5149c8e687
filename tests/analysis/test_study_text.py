"""The tables of `docs/results/study.md`, against the result files."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHODS = {
    "dense model": "dense",
    "fewer experts only": "fewer experts only",
    "MoDES alone": "as calibrated",
    "**FastMMoE**": "FastMMoE",
    '**FastMMoE**, `keep_by="redundancy"`': "FastMMoE, keep by redundancy",
    "MoDES with FastMMoE's pruning": "MoDES",
    "SparseVLM": "SparseVLM",
    "FastV": "FastV",
    "uniform stride": "uniform",
    "random (8 draws)": "random",
}
PLACES = {"": "", "layers 1, 2, 3": "stages", "layer 1": "early", "layer 4": "half"}
ROW = re.compile(r"(?P<method>.*?)(?:, (?:behind )?(?P<place>layers? [\d, ]+\d|layer \d))?(?: \((?:all|its) [^)]*\))?$")


def table(section: str) -> list[list[str]]:
    """The rows of a section's table whose cells hold accuracies and shares."""
    text = (ROOT / "docs/results/study.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = (line for line in text.splitlines() if re.search(r"\| \d\.\d+ \(", line))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def rows_of(folder: str, part: str) -> list[dict]:
    return json.loads((ROOT / f"bench/results/{folder}/{part}.json").read_text())["rows"]


def row_of(rows: list[dict], name: str, retention: float) -> dict:
    """The row that a line of a table is about."""
    said = ROW.fullmatch(name)
    method, place = METHODS[said["method"]], PLACES[said["place"] or ""]
    wanted = (method, place, retention if place else 1)
    return next(
        row
        for row in rows
        if (row["method"], row["placement"], row["retention"]) == wanted
        and (row["vision_top_k"] is None) == (method in ("dense", "as calibrated"))
    )


def is_whole(name: str) -> bool:
    """Whether all tokens are left, so that the line has one cell."""
    return not ROW.fullmatch(name)["place"]


def share(number: float) -> str:
    return "1" if number == 1 else f"{number:.2f}"


@pytest.mark.parametrize(
    ("section", "folder", "rows"), [("Scenes", "quality", 15), ("Pages", "pages", 16)], ids=["scenes", "pages"]
)
def test_the_tables_say_what_the_files_hold(section, folder, rows):
    methods, timing = rows_of(folder, "methods"), rows_of(folder, "timing")
    found = [cells for cells in table(section) if len(cells) == 4]
    assert len(found) == rows
    for name, *cells in found:
        for retention, cell in zip((0.75, 0.5, 0.25), cells, strict=True):
            if is_whole(name) and not cell:
                continue
            row, time = (row_of(part, name, retention) for part in (methods, timing))
            shares = share(row["flops_ratio"]), share(time["time_ratio"])
            assert cell == f"{row['accuracy']:.3f} ({shares[0]}; {shares[1]})", (name, retention)


def test_the_table_of_the_readme_says_what_the_files_hold():
    """Scenes at 0.5 and 0.25, pages likewise."""
    text = (ROOT / "README.md").read_text().split("## What it costs in quality")[1]
    lines = [line for line in text.splitlines() if re.search(r"\| \d\.\d+ \(", line)]
    assert len(lines) == 8
    places = [(rows_of(folder, "methods"), retention) for folder in ("quality", "pages") for retention in (0.5, 0.25)]
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        name = name.removesuffix(" of 8").replace("random tokens", "random (8 draws)")
        for cell, (rows, retention) in zip(cells, places, strict=True):
            if is_whole(name) and not cell:
                continue
            row = row_of(rows, name, retention)
            assert cell == f"{row['accuracy']:.3f} ({share(row['flops_ratio'])})", (name, retention)


def test_times_of_the_readme_are_the_benchmarks():
    rows = {
        row["variant"]: row
        for row in json.loads((ROOT / "bench/results/cpu/prefill_skipping.json").read_text())["cases"][0]["variants"]
    }
    text = (ROOT / "README.md").read_text()
    both = [rows[name]["ttft_over_stock"] for name in ("both, our experts", "both")]
    for flops, time in (
        (rows["both"]["flops_ratio"], f"{both[0]:.2f} to {both[1]:.2f}"),
        *((rows[name]["flops_ratio"], f"{rows[name]['ttft_over_stock']:.2f}") for name in ("experts only", "skip 80%")),
    ):
        assert f"| {flops:.3f} | {time} |" in text
    assert f"{rows['skip 80%']['tpot_over_stock']:.2f}" == "0.50"
    gain = json.loads((ROOT / "bench/results/cpu/vllm.json").read_text())["gains"]["median_ttft_ms"]["median"]
    assert f"| 1 / {gain:.2f} | measured" in text
