"""What the site needs beyond its pages: files of the repository that they link to, and tables out of result files."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[(?P<label>[^\[\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
SHOWN = (".png", ".jpg", ".svg")
FIGURES = re.compile(r"<!-- figures: (\w+) -->")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in figures; take along the files outside of docs/ that are linked, and refuse those that are not there."""
    markdown = FIGURES.sub(lambda found: TABLES[found[1]](), markdown)

    def linked(found: re.Match[str]) -> str:
        target = found["target"]
        if ":" in target or target.startswith("/"):
            return found[0]
        path = (ROOT / "docs" / page.file.src_uri).parent.joinpath(target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return found[0]  # MkDocs checks these
        if not path.exists() or not path.is_relative_to(ROOT):
            raise PluginError(f"{page.file.src_uri}: links to {target}, which is not there")
        inside = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            return found["label"]  # a site has no listing of it
        uri = f"repository/{inside}" if path.suffix in (*SHOWN, ".json", ".txt") else f"repository/{inside}.txt"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=path.read_bytes()))
        up = "/".join([".."] * (len(PurePosixPath(page.file.src_uri).parts) - 1))
        return f"[{found['label']}]({up + '/' if up else ''}{uri})"

    return LINK.sub(linked, markdown)


def _prefill() -> str:
    """The table of the prefill benchmark."""
    result = json.loads((ROOT / "bench/results/cpu/prefill_skipping.json").read_text())
    case = result["cases"][0]
    names = {
        "stock, grouped_mm": "stock transformers, `grouped_mm` experts (its default)",
        "stock, eager": "stock transformers, eager experts",
        "stock, our experts": "stock transformers, this package's experts: the best dense one",
        "experts only": "fewer experts only",
        "prune only": "pruning only",
        "both": "both",
        "both, our experts": "both, this package's experts in the other layers too",
        "skip 50%": "experts skipped by need, 50 %",
        "skip 80%": "experts skipped by need, 80 %",
    }
    rows = {row["variant"]: row for row in case["variants"]}
    columns = "time / stock", "time / best dense", "FLOPs / dense", "time saved per FLOPs saved", "memory / stock"
    lines = [f"| | {' | '.join(columns)} | decode step / stock |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, shown in names.items():
        row = rows[name]
        saved = row["time_saved_per_flops_saved"]
        cells = [
            f"{row['ttft_over_stock']:.2f}", f"{row['ttft_over_best_dense']:.2f}", f"{row['flops_ratio']:.3f}",
            "" if saved is None else f"{saved:.2f}", f"{row['peak_over_stock']:.2f}", f"{row['tpot_over_stock']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    stock = rows["stock, grouped_mm"]
    return "\n".join(lines) + (
        f"\n\nStock takes {stock['ttft_seconds']:.1f} s and {stock['tpot_seconds'] * 1e3:.0f} ms per decode step. "
        f"{_where(result)}, {case['rounds']} rounds in which all take turns: `{result['command']}`."
    )


def _where(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}" if "threads" in machine else ""
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return ", ".join(filter(None, (machine.get("cpu"), threads, shown, result["date"])))


TABLES = {"prefill": _prefill}
