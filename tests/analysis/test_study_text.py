"""The tables of `docs/study.md`, against the result files."""

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
    text = (ROOT / "docs/study.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = (line for line in text.splitlines() if re.search(r"\| \d\.\d+ \(", line))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    ("section", "folder", "rows"), [("Scenes", "quality", 15), ("Pages", "pages", 16)], ids=["scenes", "pages"]
)
def test_the_tables_say_what_the_files_hold(section, folder, rows):
    parts = [json.loads((ROOT / f"bench/results/{folder}/{part}.json").read_text()) for part in ("methods", "timing")]
    found = table(section)
    assert len(found) == rows
    for name, *cells in found:
        said = ROW.fullmatch(name)
        method, place = METHODS[said["method"]], PLACES[said["place"] or ""]
        for retention, cell in zip((0.75, 0.5, 0.25), cells, strict=True):
            if not place and not cell:
                continue  # all tokens are left
            row, time = (
                next(
                    row
                    for row in part["rows"]
                    if (row["method"], row["placement"], row["retention"]) == (method, place, retention if place else 1)
                    and (row["vision_top_k"] is None) == (method in ("dense", "as calibrated"))
                )
                for part in parts
            )
            shares = [1 if share == 1 else f"{share:.2f}" for share in (row["flops_ratio"], time["time_ratio"])]
            assert cell == f"{row['accuracy']:.3f} ({shares[0]}; {shares[1]})", (name, retention)
