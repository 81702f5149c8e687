"""Print what `bench_ops.py` found: a table per op, with what its bytes are."""

from rich.console import Console
from rich.table import Table

# not a terminal: wide enough for every row
WIDTH = 150


def print_report(result: dict) -> None:
    """`result` as `bench_ops.py` writes it."""
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    ceilings = result["ceilings"]
    console.print(
        f"ceilings: {ceilings['tflops']:.3g} TFLOP/s, {ceilings['tb_per_s']:.3g} TB/s; {ceilings['source']}"
    )
    console.print(about(result))
    for name, formula in result["bytes"].items():
        cases = [case for case in result["cases"] if case["op"] == name]
        if cases:
            console.print(op_table(name, formula, cases, result))
    for name, reason in result["skipped"].items():
        console.print(f"skipped {name}: {reason}", markup=False)
    if result["left_out"]:
        console.print(f"left out, the budget was spent: {'; '.join(result['left_out'])}", markup=False)


def about(result: dict) -> str:
    """Whose times these are."""
    if result["interpreted"]:
        return "fastmmoe: Triton's interpreter on a CPU. Its times say nothing; there are no speedups."
    if result["backend"] == "torch":
        return f"fastmmoe: its PyTorch backend on a {result['device'].upper()}, not its kernels."
    return "fastmmoe: its Triton kernels; torch: its PyTorch backend."


def op_table(name: str, formula: str, cases: list[dict], result: dict) -> Table:
    caption = f"bytes: {formula}\nspeedup: of fastmmoe over the row's implementation"
    table = Table(title=f"{name}, {result['dtype']}", caption=caption)
    columns = "us", "GB/s", "of copy", "TFLOP/s", "of matmul", "of roofline", "speedup", "error", "bound"
    for number, column in enumerate(("samples x tokens", "", *columns)):
        table.add_column(column, justify="right" if number > 1 else "left", no_wrap=True)
    for case in cases:
        label = f"{case['batch']} x {case['tokens']}"
        for who, entry in case["contestants"].items():
            # on a GPU: waits for the device, so that it runs at the pace of Python
            who += "" if entry["cuda_graph"] or result["device"] == "cpu" else ", no graph"
            has_flops = case["flops"] > 0
            table.add_row(
                label, who, f"{entry['us']:.1f}", f"{entry['gb_per_s']:.4g}", f"{entry['of_copy']:.2g}",
                f"{entry['tflops']:.3g}" if has_flops else "", f"{entry['of_matmul']:.2g}" if has_flops else "",
                f"{entry['of_roofline']:.2g}", f"{entry['speedup']:.2f}x" if "speedup" in entry else "",
                f"{entry['error']:.1e}{'' if entry['ok'] else ' WRONG'}", f"{entry['bound']:.0e}",
            )  # fmt: skip
            label = ""
        table.add_section()
    return table
