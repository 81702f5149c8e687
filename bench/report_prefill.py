"""Print what `bench_prefill.py` found: a table per case, padding's cost, and from how many vision tokens it pays."""

from rich.console import Console
from rich.table import Table

# not a terminal: wide enough for every row
WIDTH = 170


def print_report(result: dict) -> None:
    """`result` as `bench_prefill.py` writes it."""
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    for case in result["cases"]:
        console.print(_table(case))
    for line in break_even_lines(result["break_even"]):
        console.print(line, highlight=False)
    errors = result["model_errors"]
    console.print(
        f"calculated floors: median error {errors['ratio']:.1%} of the time / best dense, {errors['time']:.1%} of the "
        f"time; ceilings {result['ceilings']['source']}",
        highlight=False,
    )
    for label in result["left_out"]:
        console.print(f"left out, no time: {label}", highlight=False)


def _table(case: dict) -> Table:
    table = Table(title=case["label"], caption=f"best dense: {case['best_dense']}; {case['rounds']} rounds")
    columns = [
        "variant", "TTFT s", "model s", "/ stock", "/ best dense", "model", "FLOPs ratio", "saved time / FLOPs",
        "TPOT ms", "/ stock", "peak MiB", "/ stock", "kept MiB",
    ]  # fmt: skip
    if case["is_mixed"]:
        columns.append("/ one by one")
        table.caption += f"; {case['padded_share']:.1%} of the positions are padding"
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for row in case["variants"]:
        share = row["time_saved_per_flops_saved"]
        cells = [
            row["variant"], f"{row['ttft_seconds']:.3f}", f"{row['model_seconds']:.3f}",
            f"{row['ttft_over_stock']:.3f}", f"{row['ttft_over_best_dense']:.3f}", f"{row['model_over_dense']:.3f}",
            f"{row['flops_ratio']:.3f}", "" if share is None else f"{share:.2f}",
            f"{row['tpot_seconds'] * 1e3:.1f}", f"{row['tpot_over_stock']:.3f}", f"{row['peak_bytes'] / 2**20:.1f}",
            f"{row['peak_over_stock']:.3f}", f"{row['left_bytes'] / 2**20:.1f}",
        ]  # fmt: skip
        if case["is_mixed"]:
            cells.append(f"{row['padding_cost']:.3f}")
        table.add_row(*cells)
    return table


def break_even_lines(records: list[dict]) -> list[str]:
    """One line per batch size and variant."""
    lines = []
    for record in records:
        counts = [int(tokens) for tokens in record["ttft_over_best_dense"]]
        pays = {
            "always": f"at every number measured, from {min(counts)} on",
            "never": f"not at {max(counts)}, the largest number measured",
            "from": f"from {record['vision_tokens']} on",
        }[record["pays"]]
        lines.append(f"batch {record['batch']}: {record['variant']} pays, by vision tokens per sample: {pays}")
    return lines
