"""Read and rewrite one target's row of `TILES` in the source of fastmmoe_kernels/experts/tiles.py."""

import ast

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


def replace_row(source: str, target: str, row: Row, note: str) -> str:
    """`source` with the target's row replaced, or added at the end of the table.

    Raises:
        ValueError: no table `TILES` in `source`.
    """
    lines = source.splitlines(keepends=True)
    table = _find_table(source)
    for key, value in zip(table.keys, table.values, strict=True):
        if ast.literal_eval(key) == target:
            first, end = key.lineno - 1, value.end_lineno
            break
    else:
        # before the line of the closing brace
        first = end = table.end_lineno - 1
    return "".join([*lines[:first], format_row(target, row, note), *lines[end:]])


def _find_table(source: str) -> ast.Dict:
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name("TILES")], value=ast.Dict() as table):
                return table
    raise ValueError("source: expected an assignment to TILES, found none")
