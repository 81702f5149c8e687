"""The figures of `docs/results/cpu.md`, against the result files."""

import json
import re
from pathlib import Path
from statistics import median

import prefill_page
import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/results/cpu.md").read_text()
WORDS = " ".join(TEXT.split())


def result(name):
    return json.loads((ROOT / f"bench/results/cpu/{name}.json").read_text())


def cells_of(first):
    """The cells of the table row that begins with this one."""
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


@pytest.mark.parametrize(
    ("row", "key", "shown"),
    [
        ("time to first token, ms", "median_ttft_ms", "{:,.0f}"),
        ("time per output token, ms", "median_tpot_ms", "{:.2f}"),
        ("throughput, requests/s", "request_throughput", "{:.2f}"),
    ],
)
def test_vllm(row, key, shown):
    found = result("vllm")
    gain = found["gains"][key]
    times = [shown.format(median(turn[who][key] for turn in found["turns"])) for who in ("stock", "fastmmoe")]
    assert cells_of(row) == [*times, f"{gain['median']:.2f} ({gain['least']:.2f} to {gain['most']:.2f})"]
    assert f"{found['requests']} requests at concurrency {found['concurrency']} per turn, {found['rounds']}" in WORDS
    assert f"{found['date']}):" in WORDS and f"vLLM {found['versions']['vllm']}" in WORDS
    assert f"about {found['turns'][0]['stock']['input_tokens'] / found['requests']:.0f} prompt tokens" in WORDS


def test_prefill():
    """`python bench/prefill_page.py` prints the table."""
    assert f"\n\n{prefill_page.as_markdown(result('prefill_skipping'))}\n\n" in TEXT


def test_experts():
    found = result("experts")
    ratios = []
    for case in found["cases"]:
        times = {name: contestant["us"] for name, contestant in case["contestants"].items()}
        ratios.append(min(times["grouped_mm"], times["eager"]) / times["fastmmoe"])
    assert f"Over {len(ratios)} cases" in WORDS
    assert f"{median(ratios):.2f} times as long as `moe_experts` in the median, from {min(ratios):.2f} to" in WORDS
    assert f" to {max(ratios):.2f} times. At 2,048" in WORDS
    halves = [
        row["time_ratio"] for row in found["savings"] if row["contestant"] == "fastmmoe" and row["tokens"] == 2048
    ]
    assert f"At 2,048 tokens, half the experts take {min(halves):.2f} to {max(halves):.2f} of the time" in WORDS


def test_ops():
    cases = [case for case in result("ops")["cases"] if (case["tokens"], case["batch"]) == (2048, 1)]
    times = [{name: row["us"] for name, row in case["contestants"].items()} for case in cases]
    ratios = {
        case["op"]: {name: us / time["fastmmoe"] for name, us in time.items()}
        for case, time in zip(cases, times, strict=True)
    }
    loops = [ratios[op]["naive loops"] for op in ("routing", "gate", "attention", "redundancy", "prune", "experts")]
    assert cells_of("the method's definition, in loops") == [f"{x:.0f}" if x > 10 else f"{x:.1f}" for x in loops]
    router = "transformers router"
    whole, row = ratios["attention"]["attention map"], ratios["attention"]["one row"]
    assert cells_of("stock code in its place") == [
        f"{ratios['routing'][router]:.2f}", f"{ratios['gate'][router]:.2f}",
        f"{whole:.0f} (attention map); {row:.2f} (its last row alone)", "", "",
        f"{ratios['experts']['grouped_mm']:.2f} (`grouped_mm`)",
    ]  # fmt: skip


def test_decoding():
    rows = [row for row in result("overhead")["overheads"] if row["phase"] == "decode step"]
    shares = {(row["prompt"], row["method"]): row for row in rows}
    text = shares.pop(("text only", "both"))
    assert f"({text['share_of_stock']:.1%})".replace("%", " %") in WORDS
    for key, shown, unit in (("share_of_stock", ".0%", ""), ("share_of_reference", ".1%", "of the model above, ")):
        least, most = (format(pick(row[key] for row in shares.values()), shown)[:-1] for pick in (min, max))
        assert f"{unit}{least} to {most} %" in WORDS


def test_time_model():
    errors = result("prefill_skipping")["model_errors"]
    said = re.search(r"off by ([\d.]+) % in the median for the ratios .*?, by ([\d.]+) % for the seconds", WORDS)
    assert [f"{100 * errors[key]:.1f}" for key in ("ratio", "time")] == list(said.groups())


def test_transformers_suite():
    runs = result("transformers_suite")["runs"]

    def passed(*ends, key="passed"):
        return sum(run[key] for name, run in runs.items() if name.endswith(ends))

    both = sum(runs[f"{name}_Stock"]["passed"] for name in ("InternVL", "Qwen3VLMoe"))
    numbers = (passed("_Stock"), passed("_OurExperts"), passed("_Stock") - passed("_OurExperts"), both)
    assert f"{numbers[0]} pass on a stock" in WORDS and "{} of them do; the other {} go".format(*numbers[1:3]) in WORDS
    assert f"Of the {both} of the two multimodal models, {passed('_NothingReduced')} pass" in WORDS
    assert f"and {passed('_NothingPruned')} with a stage at each layer" in WORDS
    ran = [passed(end, key="passed, and ran FastMMoE") for end in ("_OurExperts", "_NothingReduced", "_NothingPruned")]
    assert "FastMMoE computes in {}, {} and {} of these tests".format(*ran) in WORDS
