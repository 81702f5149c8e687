"""An engine of vLLM's in a process of its own: reads what to run as JSON from a file, writes what came out.

    python -m tests.engines.vllm.engine SPEC RESULT
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main() -> None:
    spec, result = (Path(argument) for argument in sys.argv[1:3])
    wanted = json.loads(spec.read_text())
    result.write_text(json.dumps(run(**wanted)))


def run(directory: str, options: dict[str, Any], schedules: list[dict[str, Any]], mutation: str = "") -> dict[str, Any]:
    """
    Args:
        directory: of the checkpoint.
        options: of `vllm.LLM`.
        schedules: each `names` of cases, and `every`: a request arrives every so many steps; 0: all at once, None: each
            once the one before is done; a list: each in front of that step. `priorities`: of each.
        mutation: name of one in `mutations.py`, to be made first.

    Returns:
        `answers`: by schedule, [case, tokens] in the order of arrival; `survivors`: as in `record_survivors`;
        `preempted`: how many times; `prefix_hits`: tokens; `counts`: what Prometheus is told; and what `inside` finds.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        # vLLM's V2 runner asks for a Triton that compiles for CPUs: the interpreter takes its place
        from triton.backends import backends

        backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

    from vllm import LLM

    from fastmmoe.engines.vllm.metrics import FastMMoEStatLogger
    from tests.engines.vllm import mutations
    from tests.engines.vllm.prompts import Prompts

    if mutation:
        mutations.MUTATIONS[mutation]()
    llm = LLM(directory, dtype="float32", seed=0, disable_log_stats=False, **options)
    # a server finds it by its entry point
    llm.llm_engine.logger_manager.stat_loggers.append(FastMMoEStatLogger(llm.llm_engine.vllm_config, [0]))
    seen = record_survivors()
    prompts = Prompts(Path(directory))
    answers = [list(answer(llm.llm_engine, prompts, **schedule)) for schedule in schedules]
    metrics = {m.name: m for m in llm.get_metrics()}
    return {
        "answers": answers,
        "survivors": seen,
        "preempted": metrics["vllm:num_preemptions"].value,
        "prefix_hits": metrics["vllm:prefix_cache_hits"].value,
        "counts": prometheus(),
        **llm.apply_model(inside)[0],
    }


def answer(
    engine: Any, prompts: Any, names: list[str], every: int | list[int] | None = 0, priorities: list[int] | None = None
) -> Iterator[tuple[str, list[int]]]:
    from vllm import SamplingParams

    from tests.engines.vllm.prompts import ALL

    def arrives(number: int) -> bool:
        if isinstance(every, list):
            return steps >= every[number]
        return not engine.has_unfinished_requests() if every is None else every == 0 or steps % every == 0

    waiting = list(enumerate(names))
    done: dict[str, list[int]] = {}
    steps = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and arrives(waiting[0][0]):
            number, name = waiting.pop(0)
            case = ALL[name]
            params = SamplingParams(temperature=0, max_tokens=case.new_tokens, ignore_eos=not case.stops)
            priority = priorities[number] if priorities else 0
            engine.add_request(str(number), prompts.request(case), params, priority=priority)
            if isinstance(every, int) and every:
                break
        for output in engine.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        assert steps < 5000, f"{waiting} wait for ever"
    for number, name in enumerate(names):
        yield name, done[str(number)]


def record_survivors() -> dict[str, list]:
    """Filled with what prune stages leave of prompts: by length and vision tokens, each list of stages once."""
    from fastmmoe.engines.vllm import model

    seen: dict[str, list] = {}
    under_way: dict[int, list] = {}
    stock = model.prune_layer

    def prune_layer(tokens, *args):
        out = stock(tokens, *args)
        step, stage = tokens.step, tokens.stage
        origin = tokens.origin.split(step.lengths(stage).tolist())
        for number, (row, left) in enumerate(zip(step.rows, origin, strict=True)):
            if not row.is_pruned_now:
                continue
            stages = under_way.setdefault(number, [])
            # generated tokens of a prompt that is run again are none of the prompt's
            stages.append([p for p in (left - int(step.bounds(0)[number])).tolist() if p < row.prompt.length])
            if stage == step.stages:
                found = seen.setdefault(geometry(row.prompt.length, row.prompt.vision), [])
                if stages not in found:
                    found.append(stages)
                del under_way[number]
        return out

    model.prune_layer = prune_layer
    return seen


def geometry(length: int, vision: tuple) -> str:
    """Of a prompt."""
    return f"{length} {[list(run) for run in vision]}"


def inside(model: Any) -> dict[str, Any]:
    """Of a model when all is done: `tracked` requests, and by stretch whether it was compiled, in `compiled`."""
    from fastmmoe.engines.vllm.stretches import Stretch

    reduction = getattr(model, "reduction", None)
    if reduction is None:
        return {}
    stretches = [part for part in reduction._parts if isinstance(part, Stretch)]
    return {
        "tracked": len(reduction.requests._prompts),
        "compiled": [not part.do_not_compile and part.compiled for part in stretches],
    }


def prometheus() -> dict[str, float]:
    from prometheus_client import REGISTRY

    return {
        f"{sample.name}{'/' + sample.labels['reason'] if 'reason' in sample.labels else ''}": sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name.startswith("fastmmoe:") and sample.name.endswith("_total")
    }


if __name__ == "__main__":
    main()
