"""What the samples of a prefill benchmark say: medians, the best dense variant, ratios, the break-even."""

import statistics
from collections.abc import Iterable

Seconds = list[float]


def find_best_dense(seconds: dict[str, Seconds], dense: Iterable[str]) -> str:
    """The dense variant with the smallest median."""
    return min(dense, key=lambda name: statistics.median(seconds[name]))


def median_ratio(seconds: Seconds, base: Seconds) -> float:
    """Median of the ratios of each round: what the machine did in that round cancels."""
    return statistics.median(s / b for s, b in zip(seconds, base, strict=True))


def summarise(samples: dict[str, list[dict[str, float]]], known: dict[str, dict]) -> dict:
    """One case: the best dense variant and a row per variant.

    Args:
        samples: per variant and round, seconds: `ttft`, `tpot`, and of a mixed batch `one_by_one`.
        known: per variant, what does not depend on the round: `method`, `flops_saved`, `peak_bytes`, ...; the first is
            the stock model.
    """
    series = {
        kind: {name: [run[kind] for run in runs] for name, runs in samples.items()}
        for kind in next(iter(samples.values()))[0]
    }
    stock, *_ = known
    best = find_best_dense(series["ttft"], [name for name in known if known[name]["method"] == "dense"])
    rows = []
    for name, facts in known.items():
        row = {"variant": name, **facts, "flops_ratio": 1 - facts["flops_saved"]}
        for kind in ("ttft", "tpot"):
            row[f"{kind}_seconds"] = statistics.median(series[kind][name])
            row[f"{kind}_over_stock"] = median_ratio(series[kind][name], series[kind][stock])
            row[f"{kind}_over_best_dense"] = median_ratio(series[kind][name], series[kind][best])
        saved = 1 - row["ttft_over_best_dense"]
        row["time_saved_per_flops_saved"] = saved / facts["flops_saved"] if facts["flops_saved"] else None
        row["peak_over_stock"] = facts["peak_bytes"] / known[stock]["peak_bytes"]
        if "one_by_one" in series:
            row["padding_cost"] = median_ratio(series["ttft"][name], series["one_by_one"][name])
        rows.append(row)
    return {"best_dense": best, "variants": rows}


def add_model(case: dict, model_seconds: dict[str, float]) -> None:
    """Put calculated seconds beside the measured ones of a case as `summarise` gives it.

    Errors are relative to the measurement: of the time, and for variants that reduce something of the ratio to the
    best dense variant.

    Args:
        model_seconds: per variant.
    """
    base = model_seconds[case["best_dense"]]
    for row in case["variants"]:
        row["model_seconds"] = seconds = model_seconds[row["variant"]]
        row["model_over_dense"] = ratio = seconds / base
        row["model_time_error"] = seconds / row["ttft_seconds"] - 1
        is_dense = row["method"] == "dense"
        row["model_ratio_error"] = None if is_dense else ratio / row["ttft_over_best_dense"] - 1


def median_errors(cases: list[dict]) -> dict[str, float]:
    """Medians over all cases and variants of what `add_model` found, without their signs."""
    rows = [row for case in cases for row in case["variants"]]

    def median(name: str) -> float:
        return statistics.median(abs(row[name]) for row in rows if row[name] is not None)

    return {"ratio": median("model_ratio_error"), "time": median("model_time_error")}


def break_even(ratios: dict[int, float]) -> tuple[str, int | None]:
    """Smallest number of tokens from which on all ratios are below 1.

    Args:
        ratios: number of vision tokens -> time over the best dense variant's.

    Returns:
        ("from", tokens); ("always", None) where it pays at every number measured; ("never", None) where it does not
        pay at the largest.
    """
    smallest = None
    for tokens in sorted(ratios, reverse=True):
        # written so that NaN does not pay
        if not ratios[tokens] < 1:
            break
        smallest = tokens
    if smallest is None:
        return "never", None
    return ("always", None) if smallest == min(ratios) else ("from", smallest)


def find_break_evens(cases: list[dict]) -> list[dict]:
    """Per batch size and variant of the whole method, over the cases that are not mixed: where it begins to pay.

    Returns:
        Records with `vision_tokens` per sample, `min_vision_tokens` of the whole batch (what FastMMoEConfig's field of
        that name counts), and the ratios by vision tokens per sample.
    """
    found: dict[tuple[int, str], dict[int, float]] = {}
    for case in cases:
        for row in () if case["is_mixed"] else case["variants"]:
            if row["method"] == "both":
                ratios = found.setdefault((case["batch"], row["variant"]), {})
                ratios[case["vision_tokens"][0]] = row["ttft_over_best_dense"]
    records = []
    for (batch, variant), ratios in found.items():
        pays, tokens = break_even(ratios)
        records.append(
            {"batch": batch, "variant": variant, "pays": pays, "vision_tokens": tokens,
             "min_vision_tokens": None if tokens is None else batch * tokens,
             "ttft_over_best_dense": {str(count): ratios[count] for count in sorted(ratios)}}
        )  # fmt: skip
    return records
