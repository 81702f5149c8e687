"""Rewrite one target's rows of `TILES` and `MOST_PAIRS` in the source of fastmmoe_kernels/experts/tiles.py."""

import ast
import math

from fastmmoe_kernels.experts.tiles import GemmTile

Row = dict[int, tuple[GemmTile, GemmTile]]  # rows per tile -> tiles of gate_up and down


def format_row(target: str, row: Row, note: str) -> str:
    """Source lines of a row, with where it comes from beside its key."""
    lines = [f'    "{target}": {{  # {note}']
    for rows, (gate_up, down) in sorted(row.items()):
        lines.append(f"        {rows}: ({_format(gate_up)}, {_format(down)}),")
    return "\n".join([*lines, "    },", ""])


def _format(tile: GemmTile) -> str:
    group = "" if tile.group_m == GemmTile.__dataclass_fields__["group_m"].default else f", group_m={tile.group_m}"
    return f"GemmTile({tile.block_n}, {tile.block_k}, {tile.num_warps}, {tile.num_stages}{group})"


def format_most_pairs(target: str, most: dict[int, float], note: str) -> str:
    """The source line of a row of `MOST_PAIRS`."""
    items = ", ".join(f"{rows}: {'math.inf' if pairs == math.inf else pairs}" for rows, pairs in sorted(most.items()))
    return f'    "{target}": {{{items}}},  # {note}\n'


def find_most_pairs(medians: dict[float, dict[int, float]]) -> dict[int, float]:
    """Up to how many pairs per expert each number of rows per tile is the best.

    Args:
        medians: pairs per expert -> rows per tile -> seconds.

    Returns:
        rows per tile -> pairs per expert, never falling, the last infinite; between two that were timed, their
        geometric mean.
    """
    pairs = sorted(medians)
    best = [min(medians[p], key=medians[p].get) for p in pairs]
    *small, largest = sorted(medians[pairs[0]])
    most: dict[int, float] = {}
    for rows in small:
        # from the first on where more rows are better, noise does not lead back
        beyond = next((i for i, b in enumerate(best) if b > rows), len(pairs))
        low = pairs[beyond - 1] if beyond else pairs[0] / 2
        high = pairs[beyond] if beyond < len(pairs) else low
        most[rows] = round(math.sqrt(low * high))
    return most | {largest: math.inf}


def replace_row(source: str, target: str, text: str, name: str = "TILES") -> str:
    """`source` with the target's row of a table replaced by `text`, or that added at the end of the table.

    Raises:
        ValueError: no such table in `source`.
    """
    lines = source.splitlines(keepends=True)
    table = _find_table(source, name)
    for key, value in zip(table.keys, table.values, strict=True):
        if ast.literal_eval(key) == target:
            first, end = key.lineno - 1, value.end_lineno
            # what was said of the old row
            while lines[first - 1].lstrip().startswith("#"):
                first -= 1
            break
    else:
        # before the line of the closing brace
        first = end = table.end_lineno - 1
    return "".join([*lines[:first], text, *lines[end:]])


def _find_table(source: str, name: str) -> ast.Dict:
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id)], value=ast.Dict() as table) if id == name:
                return table
    raise ValueError(f"source: expected an assignment to {name}, found none")
