"""What a study's parts say together: paired differences between methods, and tables to read, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastmmoe.study.accuracy import answers_of, paired_difference
from fastmmoe.study.methods import entries, key_of
from fastmmoe.study.prediction import SHOWN
from fastmmoe.study.results import read_parts, write_csv
from fastmmoe.study.study import PARTS

Row = Mapping[str, Any]
REFERENCES = tuple(entry.name for entry in entries() if entry.is_reference)


def write_tables(out: Path) -> list[Path]:
    """`comparisons.csv` and `tables.md` from the parts that are complete in a directory; the files written."""
    parts = read_parts(out, PARTS)
    rows = [row for part in ("methods", "chosen") if part in parts for row in parts[part]["rows"]]
    written = []
    if rows:
        write_csv(out / "comparisons.csv", comparisons(rows))
        written.append(out / "comparisons.csv")
    if parts:
        (out / "tables.md").write_text("\n\n".join(_sections(parts)) + "\n", encoding="utf-8")
        written.append(out / "tables.md")
    return written


def comparisons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Accuracy of each method minus a reference's, on the same questions, where both prune alike.

    Alike: the same placement, retention and experts. The dense model and fewer experts alone are references for all.
    """
    found = []
    everywhere = [row for row in rows if not row["placement"]]
    for row in rows:
        peers = [other for other in rows if other["placement"] and _place(other) == _place(row)]
        references = [other for other in peers if other["method"] in REFERENCES] + everywhere
        for other in references:
            if other is row or (not other["placement"] and other["vision_top_k"] not in (None, row["vision_top_k"])):
                continue
            difference, error = paired_difference(answers_of(row), answers_of(other))
            found.append(
                {
                    "method": row["method"],
                    "against": other["method"],
                    "placement": row["placement"],
                    "retention": row["retention"],
                    "vision_top_k": row["vision_top_k"],
                    "difference": difference,
                    "standard_error": error,
                    "flops_ratio": row["flops_ratio"],
                    "flops_ratio_against": other["flops_ratio"],
                    "n": row["n"],
                }
            )
    return found


def frontier(rows: Iterable[Row]) -> list[Row]:
    """The dense model, and the rows that no other answers better than at as few FLOPs, from dear to cheap."""
    rows = sorted(rows, key=lambda row: (row["flops_ratio"], -row["accuracy"]))
    best: list[Row] = []
    for row in rows:
        if not best or row["accuracy"] > best[-1]["accuracy"]:
            best.append(row)
    dense = [row for row in rows if row["config"] is None and row not in best]
    return dense[:1] + best[::-1]


def _place(row: Row) -> tuple:
    return row["placement"], row["retention"], row["vision_top_k"]


def _sections(parts: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    times = {key_of(row): row["time_ratio"] for row in parts.get("timing", {}).get("rows", ())}
    for part in ("methods", "chosen"):
        if part in parts:
            yield _head(part, parts[part])
            yield from _method_tables(parts[part]["rows"], times)
    typed = [row for part in ("methods", "chosen") if part in parts for row in parts[part]["rows"] if row["types"]]
    if typed:
        yield "## types\n\nThe same by type of question, all experts."
        yield from _type_tables(typed)
    if "heatmap" in parts:
        yield _head("heatmap", parts["heatmap"])
        yield _experts_table(parts["heatmap"]["rows"], "vision_top_k", "K_v")
    for part in ("routing", "magnitude"):
        if part in parts:
            yield _head(part, parts[part])
            yield _layers(parts[part]["rows"])
    if "ablations" in parts:
        yield _head("ablations", parts["ablations"])
        yield _ablations(parts["ablations"]["rows"])
    if "budget" in parts:
        yield _head("budget", parts["budget"])
        yield from _budget(parts["budget"])


def _head(part: str, result: Mapping[str, Any]) -> str:
    machine, study = result["machine"], result["study"]
    where = machine["gpu"] or f"{machine['threads']} thread(s) of {machine['cpu']}"
    return f"## {part}\n\n{PARTS[part]}. `{result['command']}`, {study['model']['name']}, {where}, {result['date']}."


def _method_tables(rows: Sequence[Row], times: Mapping[tuple, float]) -> Iterable[str]:
    """One table per placement: methods by retention."""
    for placement in dict.fromkeys(row["placement"] for row in rows):
        found = [row for row in rows if row["placement"] == placement]
        retentions = sorted({row["retention"] for row in found}, reverse=True)
        lines: dict[tuple, dict[float, Row]] = {}
        for row in found:
            lines.setdefault((row["vision_top_k"] is not None, row["method"]), {})[row["retention"]] = row
        layers = ", ".join(str(layer) for layer in found[0]["prune_layers"])
        title = f"pruned at {layers} ({placement})" if placement else "not pruned"
        columns = [f"{retention:g} left" if placement else "all left" for retention in retentions]
        body = [
            [f"{name}{', fewer experts' if fewer and placement else ''}"]
            + [_figures(by_retention.get(retention), times) for retention in retentions]
            for (fewer, name), by_retention in sorted(lines.items(), key=lambda item: item[0][0])
        ]
        yield _table([title, *columns], body)
    yield _legend(rows, "; prefill time / dense where it was measured")


def _figures(row: Row | None, times: Mapping[tuple, float]) -> str:
    if row is None:
        return ""
    cost = f"{row['flops_ratio']:.2f}"
    if SHOWN in row.get("time_ratio_predicted", ()):
        cost += f"; {SHOWN} {row['time_ratio_predicted'][SHOWN]:.2f}"
    if key_of(row) in times:
        cost += f"; {times[key_of(row)]:.2f}"
    return f"{row['accuracy']:.3f} ± {row['standard_error']:.3f} ({cost})"


def _legend(rows: Sequence[Row], measured: str = "") -> str:
    """What `_figures` are; older rows have no calculated time."""
    predicted = f"; {SHOWN}: calculated time of one prompt's prefill there / dense"
    is_predicted = any(SHOWN in row.get("time_ratio_predicted", ()) for row in rows)
    return f"Exact match ± standard error (FLOPs / dense{predicted if is_predicted else ''}{measured})."


def _type_tables(rows: Sequence[Row]) -> Iterable[str]:
    """One table per placement: methods and retentions by type of question."""
    rows = [row for row in rows if row["vision_top_k"] is None]
    names = list(dict.fromkeys(name for row in rows for name in row["types"]))
    everywhere = [row for row in rows if not row["placement"]]
    for placement in dict.fromkeys(row["placement"] for row in rows if row["placement"]):
        found = sorted((row for row in rows if row["placement"] == placement), key=lambda row: -row["retention"])
        layers = ", ".join(str(layer) for layer in found[0]["prune_layers"])
        lines = [(row["method"], row) for row in everywhere]
        lines += [(f"{row['method']}, {row['retention']:g} left", row) for row in found]
        yield _by_type(f"pruned at {layers} ({placement})", lines, names)
    yield f"Exact match; {rows[0]['n']} questions of {len(names)} types."


def _by_type(title: str, lines: Iterable[tuple[str, Row]], names: Sequence[str]) -> str:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    body = [[label, share(row["accuracy"]), *(share(row["types"].get(name)) for name in names)] for label, row in lines]
    return _table([title, "all", *names], body)


def _experts_table(rows: Sequence[Row], column: str, symbol: str) -> str:
    """The first layer with fewer experts by how many there are; the dense model's row is the first."""
    dense = rows[0]
    counts = sorted({row[column] for row in rows[1:]})
    by_place = {(row["reduction_layer"], row[column]): row for row in rows[1:]}
    body = [
        [str(layer), *(_figures(by_place[layer, count], {}) for count in counts)]
        for layer in sorted({row["reduction_layer"] for row in rows[1:]})
    ]
    table = _table(["l_v", *(f"{symbol} = {count}" for count in counts)], body)
    return f"{table}\n\nDense: {dense['accuracy']:.3f} ± {dense['standard_error']:.3f}.\n\n{_legend(rows)}"


def _budget(result: Mapping[str, Any]) -> Iterable[str]:
    rows = result["rows"]
    if not rows:
        yield f"None: {result['why_empty']}."
        return
    yield _experts_table(rows, "expert_budget", "B")
    if names := list(rows[0]["types"]):
        lines = [("dense", rows[0])]
        lines += [(f"B = {row['expert_budget']} from {row['reduction_layer']} on", row) for row in rows[1:]]
        yield _by_type("experts", lines, names)


def _layers(rows: Sequence[Row]) -> str:
    columns = sorted({(row["modality"], row["quantity"]) for row in rows}, reverse=True)
    cells = {(row["layer"], row["modality"], row["quantity"]): row for row in rows}
    body = [
        [str(layer), *(_mean(cells.get((layer, *column))) for column in columns)]
        for layer in sorted({row["layer"] for row in rows})
    ]
    return _table(["layer", *(f"{modality}, {quantity}" for modality, quantity in columns)], body)


def _mean(row: Row | None) -> str:
    if row is None:
        return ""
    error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.3f}"
    return f"{row['mean']:.3f}{error}"


def _ablations(rows: Sequence[Row]) -> str:
    """Settings by placement and retention, the best mean first."""
    pruned = [row for row in rows if row["config"] is not None]
    places = list(dict.fromkeys((row["placement"], row["retention"]) for row in pruned))
    names = ("keep_by", "window", "alpha", "merge_ratio", "strategy", "merge_method")
    lines: dict[tuple, dict[tuple, float]] = {}
    for row in pruned:
        setting = tuple(row["config"][name] for name in names)
        lines.setdefault(setting, {})[row["placement"], row["retention"]] = row["accuracy"]

    def mean(by_place: Mapping[tuple, float]) -> float:
        return fmean(by_place.values())  # the same on every Python: sum() is more exact from 3.12 on

    body = [
        [*map(str, setting), *(f"{by_place[place]:.3f}" for place in places), f"{mean(by_place):.3f}"]
        for setting, by_place in sorted(lines.items(), key=lambda item: -mean(item[1]))
    ]
    head = ["keep by", "W", "alpha", "merge ratio", "strategy", "merge"]
    head += [*(f"{placement}, {retention:g} left" for placement, retention in places), "mean"]
    error = max(row["standard_error"] for row in rows)
    return f"{_table(head, body)}\n\nAll experts; n {rows[0]['n']}, standard errors up to {error:.3f}."


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))
