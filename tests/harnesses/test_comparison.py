"""Runs side by side, by hand."""

from fastmmoe.harnesses.comparison import as_markdown

COSTS = {
    "flops": 2e9, "flops_ratio": 1.0, "prefill_latency_s": 0.02, "first_token_latency_s": 0.05, "answered": 8
}  # fmt: skip
SCORES = {"a": {"acc": 0.5}, "b": {"em": 1.0}}
DENSE = {"name": "dense", "config": None, "scores": SCORES, "n": {"a": 2}, "costs": COSTS}
HALF = {**DENSE, "name": "half", "scores": {"a": {"acc": None}}, "costs": {**COSTS, "flops": 1e9, "flops_ratio": 0.5}}
REST = {**HALF, "name": "rest", "costs": {**HALF["costs"], "answered": 3}}
THERE = {**DENSE, "name": "there", "costs": {}}


def test_table_by_hand():
    head, rule, *rows = as_markdown([DENSE, HALF, REST, THERE]).splitlines()
    assert head == "| run | a: acc | b: em | FLOPs | prefill | first token |" and rule.count("---:") == 5
    assert rows == [
        "| dense | 0.5000 | 1.0000 | 2e+09 (1.00) | 20.0 ms (1.00) | 50.0 ms (1.00) |",
        "| half |  |  | 1e+09 (0.50) | 20.0 ms (1.00) | 50.0 ms (1.00) |",
        "| rest |  |  | 1e+09 (0.50) | 20.0 ms | 50.0 ms |",
        "| there | 0.5000 | 1.0000 |  |  |  |",
    ]


def test_nothing_is_compared_with_a_first_run_that_asked_nothing():
    assert as_markdown([THERE, HALF]).splitlines()[-1] == "| half |  |  | 1e+09 (0.50) | 20.0 ms | 50.0 ms |"


def test_bars_in_names_are_no_columns():
    runs = [{"name": "dense", "scores": {"t": {"split=none|Overall": 0.5}}, "costs": {}}]
    assert as_markdown(runs).splitlines()[0] == "| run | t: split=none\\|Overall | FLOPs | prefill | first token |"
