"""Mistakes in the plugin's bookkeeping that the comparison has to notice, one for each thing that it keeps.

Each is made in the engine's process before the engine is.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

MUTATIONS: dict[str, Callable[[], None]] = {}


def mutation(make: Callable[[], None]) -> Callable[[], None]:
    MUTATIONS[make.__name__] = make
    return make


def replace(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Put `change(stock)` in the place of an attribute."""
    setattr(owner, name, change(getattr(owner, name)))


@mutation
def cache_one_token_too_short_when_decoding():
    from fastmmoe.engines.vllm.plan import Step

    replace(Step, "removed", lambda stock: lambda self, stage: (
        stock(self, stage) if self.prunes else stock(self, stage) + (stock(self, stage) > 0).astype(np.int32)
    ))  # fmt: skip


@mutation
def cache_not_shortened_when_decoding():
    from fastmmoe.engines.vllm.plan import Step

    replace(Step, "removed", lambda stock: lambda self, stage: stock(self, stage) * self.prunes)


@mutation
def stock_slots_when_decoding():
    from fastmmoe.engines.vllm.model import Reduction

    replace(Reduction, "name_slots", lambda stock: lambda self: None)


@mutation
def stock_slots_in_a_prefill():
    from fastmmoe.engines.vllm.model import Reduction

    replace(Reduction, "_name_slots", lambda stock: lambda self, lengths: (
        stock(self, lengths) if lengths is None else None
    ))  # fmt: skip


@mutation
def the_rows_last_token_asks():
    from fastmmoe.engines.vllm.plan import Step

    def change(stock):
        def cut(self, stage):
            made, rows = stock(self, stage), [row.is_pruned_now for row in self.rows]
            last, lengths = self.bounds(stage)[1:][rows] - 1, self.lengths(stage)[rows]
            return type(made)(made.layout, made.padded, last.astype(np.int64), lengths.astype(np.int64), made.packed)

        return cut

    replace(Step, "cut", change)


@mutation
def forgotten_that_a_prompt_was_pruned():
    from fastmmoe.engines.vllm.requests import Requests

    def change(stock):
        def step(self, names, computed, new):
            self._short -= {name for name, done in zip(names, computed, strict=True) if done > 0}
            return stock(self, names, computed, new)

        return step

    replace(Requests, "step", change)


@mutation
def vision_mask_of_the_stage_before():
    from fastmmoe.engines.vllm import prefill

    def change(stock):
        def pack(tokens, pruned, padded, packed, *streams):
            before = tokens.vision
            out = stock(tokens, pruned, padded, packed, *streams)
            tokens.vision = before[: len(tokens.vision)]
            return out

        return pack

    replace(prefill, "_pack", change)


@mutation
def input_positions_of_the_stage_before():
    from fastmmoe.engines.vllm import prefill

    def change(stock):
        def pack(tokens, *args):
            before = tokens.origin
            out = stock(tokens, *args)
            tokens.origin = before[: len(tokens.origin)]
            return out

        return pack

    replace(prefill, "_pack", change)


@mutation
def position_encodings_of_the_stage_before():
    from fastmmoe.engines.vllm import prefill

    def change(stock):
        def pack(tokens, pruned, padded, packed, positions, *streams):
            _, *others = stock(tokens, pruned, padded, packed, positions, *streams)
            return positions[..., : len(tokens.origin)], *others

        return pack

    replace(prefill, "_pack", change)


@mutation
def pruned_blocks_in_the_prefix_cache():
    from fastmmoe.engines.vllm import scheduler

    def change(stock):
        def init(self, *args, **kwargs):
            stock(self, *args, **kwargs)
            del self.kv_cache_manager.coordinator.cache_blocks

        return init

    replace(scheduler.WholeImages, "__init__", change)


@mutation
def pruned_prompts_read_the_prefix_cache():
    from fastmmoe.engines.vllm.scheduler import WholeImages

    del WholeImages._get_local_prefix_cache_hit


@mutation
def image_prompts_in_chunks():
    from fastmmoe.engines.vllm.scheduler import WholeImages

    del WholeImages._try_schedule_encoder_inputs
