"""Print what `bench_experts.py` found: the block against its peers, its kernels one by one, what fewer experts save."""

from rich.console import Console
from rich.table import Table

# not a terminal: wide enough for every row
WIDTH = 150


def print_report(result: dict) -> None:
    """`result` as `bench_experts.py` writes it."""
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    ceilings = result["ceilings"]
    tflops, tb_per_s = ceilings["tflops"], ceilings["tb_per_s"]
    console.print(f"ceilings: {tflops:.3g} TFLOP/s, {tb_per_s:.3g} TB/s; {ceilings['source']}")
    if any("contestants" in case for case in result["cases"]):
        console.print(_block_table(result))
        if any("kernels" in case for case in result["cases"]):
            console.print(_kernel_table(result))
        if result["savings"]:
            console.print(_savings_table(result))
    else:
        console.print(_estimate_table(result))
    for name, reason in result["skipped"].items():
        console.print(f"skipped {name}: {reason}", markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number > 1 else "left", no_wrap=True)
    return table


def _label(case: dict) -> str:
    return f"{case['shape']}, {case['tokens']} x {case['top_k']}, {case['routing']}"


def _block_table(result: dict) -> Table:
    table = _table(
        f"experts block, {result['dtype']}, useful operations only",
        "shape, tokens x experts, routing", "", "us", "TFLOP/s", "of roofline", "of bmm", "empty rows", "speedup",
        "row error",
    )  # fmt: skip
    for case in result["cases"]:
        label = _label(case)
        for name, entry in case["contestants"].items():
            # on a GPU: waits for the device, so that it runs at the pace of Python
            name += "" if entry["cuda_graph"] or result["device"] == "cpu" else ", no graph"
            waste = 1 - 1 / case["padding"] if name == "fastmmoe" and "padding" in case else None
            speedup = entry.get("speedup")
            table.add_row(
                label, name, f"{entry['us']:.0f}", f"{entry['tflops']:.3g}", f"{entry['of_roofline']:.3f}",
                f"{entry['of_bmm']:.3f}", "" if waste is None else f"{waste:.1%}",
                "" if speedup is None else f"{speedup:.2f}x", f"{entry['error']:.1e}{'' if entry['ok'] else ' WRONG'}",
            )  # fmt: skip
            label = ""
    table.caption = "speedup: of fastmmoe over the row's implementation"
    return table


def _kernel_table(result: dict) -> Table:
    table = _table(
        "kernels, one by one",
        "shape, tokens x experts, routing", "kernel", "us", "rate", "of roofline", "of bmm", "bmm, TFLOP/s",
    )  # fmt: skip
    for case in result["cases"]:
        label = _label(case)
        for name, entry in case.get("kernels", {}).items():
            rate = f"{entry['tflops']:.3g} TFLOP/s" if "tflops" in entry else ""
            rate = f"{entry['tb_per_s']:.2f} TB/s" if "tb_per_s" in entry else rate
            shares = (f"{entry[key]:.3f}" if key in entry else "" for key in ("of_roofline", "of_bmm"))
            bmm = f"{case['bmm'][name]['tflops']:.3g}" if name in case["bmm"] else ""
            table.add_row(label, name, f"{entry['us']:.1f}", rate, *shares, bmm)
            label = ""
    return table


def _savings_table(result: dict) -> Table:
    table = _table("fewer experts per token", "shape, tokens, routing", "", "experts", "time", "operations")
    for saving in result["savings"]:
        table.add_row(
            "{shape}, {tokens}, {routing}".format(**saving), saving["contestant"], "{from} -> {to}".format(**saving),
            f"{saving['time_ratio']:.3f}x", f"{saving['flops_ratio']:.3f}x",
        )  # fmt: skip
    return table


def _estimate_table(result: dict) -> Table:
    table = _table(
        "rooflines, TFLOP/s end to end", "shape, tokens x experts, routing", "pairs/expert", "busiest expert",
        "roofline", "128-row tiles", "64-row tiles",
    )  # fmt: skip
    for case in result["cases"]:
        table.add_row(
            _label(case), f"{case['pairs_per_expert']:.0f}", f"{case['imbalance']:.1f}x",
            *(f"{case[key]:.0f}" for key in (
                "roofline_tflops", "padded_128_roofline_tflops", "padded_64_roofline_tflops"
            )),
        )  # fmt: skip
    return table
