"""What became of vision tokens, counted in the engine's process and told to Prometheus in the server's."""

from collections import Counter
from functools import cache

import prometheus_client
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from fastmmoe.config import ReductionConfig
from fastmmoe.engines.vllm.options import read_config
from fastmmoe.engines.vllm.plan import DENSE, Prompt
from fastmmoe_kernels import prune_plan

PREFIX = "fastmmoe/"


class Counts:
    """Counts since they were last sent.

    They travel in the place of waiting LoRA adapters, of which there are none: LoRA is refused.
    """

    def __init__(self) -> None:
        self._counter: Counter[str] = Counter()

    def add(self, config: ReductionConfig, prompt: Prompt) -> None:
        """Count a prompt."""
        if not prompt.vision:
            return
        if prompt.dense:
            self._counter[f"dense/{prompt.dense}"] += 1
        left = prompt.left or (prompt.n_vision,)
        self._counter["kept"] += left[-1]
        self._counter["dropped"] += left[0] - left[-1]
        self._counter["pruned"] += prompt.prunes
        for stage, entering in enumerate(prompt.left[:-1]):
            # behind the first stage the device alone knows the runs; one run of them has the fewest windows
            runs = [entering] if stage else [end - start for start, end in prompt.vision]
            plan = prune_plan(runs, config.stage_keep_ratios[stage], config.merge_ratio, config.window)
            self._counter["merged"] += plan.merged

    def send(self, stats: SchedulerStats) -> None:
        stats.waiting_lora_adapters |= {PREFIX + name: count for name, count in self._counter.items()}
        self._counter.clear()


@cache
def _metrics() -> dict[str, prometheus_client.Counter]:
    """Once per process: their names are Prometheus's."""

    def counter(name: str, text: str, *labels: str) -> prometheus_client.Counter:
        return prometheus_client.Counter(f"fastmmoe:{name}", text, ["engine", *labels])

    return {
        "kept": counter("vision_tokens_kept", "Vision tokens of prompts that reach the last layer."),
        "dropped": counter("vision_tokens_dropped", "Vision tokens of prompts that do not, merged ones too."),
        "merged": counter("vision_tokens_merged", "Tokens that stand for a merged window, at each stage."),
        "pruned": counter("prompts_pruned", "Prompts whose vision tokens were pruned."),
        "dense": counter("prompts_dense", "Prompts with vision tokens that were not pruned, by reason.", "reason"),
    }


class FastMMoEStatLogger(AggregateStatLoggerBase):
    """Entry point of `vllm.stat_logger_plugins`; silent in a server that reduces nothing."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]):
        self._is_on = read_config(vllm_config) is not None
        if not self._is_on:
            return
        for engine in map(str, engine_indexes):
            for name, metric in _metrics().items():
                for labels in [(engine, reason) for reason in DENSE] if name == "dense" else [(engine,)]:
                    metric.labels(*labels)  # shown as 0 from the start

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if not self._is_on or scheduler_stats is None:
            return
        for key, count in scheduler_stats.waiting_lora_adapters.items():
            if key.startswith(PREFIX):
                name, *reason = key.removeprefix(PREFIX).split("/")
                _metrics()[name].labels(str(engine_idx), *reason).inc(count)

    def log_engine_initialized(self) -> None:
        pass
