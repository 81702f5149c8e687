"""The files of a study: one JSON file per part with all of it, a CSV file beside it with the figures."""

from __future__ import annotations

import csv
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fastmmoe

NOT_IN_CSV = ("right", "config")  # long, and in the JSON file


class PartFile:
    """The result of one part, written anew with every row, so that nothing is lost and a later run can go on.

    Attributes:
        rows: what there is so far.
    """

    def __init__(self, out: Path, part: str, header: Mapping[str, Any], resume: bool):
        """Start a part's file, or go on with it.

        Args:
            header: what the rows depend on and where they were made, see `header`.
            resume: keep the rows of a file that there is.

        Raises:
            ValueError: the file to go on with holds another study's rows, or none.
        """
        self.path = out / f"{part}.json"
        self._header = dict(header) | {"part": part}
        self.rows: list[dict[str, Any]] = []
        self.is_complete = False
        if resume and self.path.exists():
            found = _read(self.path)
            if differing := _differing(found["study"], self._header["study"]):
                raise ValueError(
                    f"{self.path}: holds rows of another study ({'; '.join(differing)}); "
                    "expected the same settings, another directory, or to start anew"
                )
            # where and when the rows there are were made
            self._header = {name: value for name, value in found.items() if name not in ("rows", "complete")}
            self.rows, self.is_complete = found["rows"], found["complete"]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._write()

    def finish(self, rows: Iterable[dict[str, Any]] | None = None) -> None:
        """Mark the part as complete, with `rows` in place of those there are if given, and write the CSV file."""
        self.rows = self.rows if rows is None else list(rows)
        # in this order: rows are kept before anything may fail, and a part that is complete has both files
        self._write()
        write_csv(self.path.with_suffix(".csv"), self.rows)
        self.is_complete = True
        self._write()

    def _write(self) -> None:
        write_whole(self.path, self._header | {"complete": self.is_complete, "rows": self.rows})


def write_whole(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a kill at any moment leaves the old or the new file; through a link, that which it names."""
    path = path.resolve()
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def header(study: Mapping[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """The head of a part's file: what was asked (`study`), how to read it, and where and with what it was measured."""
    return {
        "study": json.loads(json.dumps(study)),
        "notes": list(notes),
        "date": date.today().isoformat(),
        "machine": {
            "cpu": _cpu_name(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
        },
        "versions": {"fastmmoe": fastmmoe.__version__} | {name: version(name) for name in ("torch", "transformers")},
        # another machine's folders say nothing
        "command": shlex.join(["fastmmoe", *(Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:])]),
    }


def read_parts(out: Path, parts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The complete results in a directory, by part.

    Raises:
        ValueError: a file that holds none.
    """
    found = {part: _read(path) for part in parts if (path := out / f"{part}.json").exists()}
    return {part: result for part, result in found.items() if result["complete"]}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV: one column per figure, nested ones as `outer:inner`, lists with spaces between."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        is_part = isinstance(found["study"], dict) and isinstance(found["rows"], list) and "complete" in found
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: no results of a study ({type(error).__name__}: {error})") from error
    if not is_part:
        raise ValueError(f"{path}: no results of a study, expected study, rows and complete")
    return found


def _differing(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What two studies differ in, in words."""
    found = []
    for name in sorted({*there, *here}):
        one, other = there.get(name), here.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differing(one, other, f"{prefix}{name} ")
        elif one != other:
            found.append(f"{prefix}{name} was {one!r} and is {other!r}")
    return found


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name in NOT_IN_CSV:
            continue
        if isinstance(value, Mapping):
            flat |= {f"{name}:{inner}": _cell(one) for inner, one in value.items()}
        else:
            flat[name] = _cell(value)
    return flat


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return " ".join(str(_cell(one)) for one in value)
    return f"{value:.6g}" if isinstance(value, float) else value


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else ()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
