"""vLLM's schedulers, with image prompts kept whole and the prefix cache kept clean."""

from typing import Any
from weakref import WeakKeyDictionary

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from fastmmoe.engines.vllm.metrics import Counts
from fastmmoe.engines.vllm.options import rules_of
from fastmmoe.engines.vllm.plan import DENSE, Prompt
from fastmmoe.engines.vllm.requests import read_prompt

logger = init_logger(f"vllm.{__name__}")


class WholeImages:
    """Runs a prompt that is to be pruned in one step, from its first token on.

    It waits for a step whose budget holds it; requests behind it wait too, so it is the next one. The prefix cache
    gets the blocks in front of its first vision token alone: those behind depend on the question. It takes none from
    it, for the last token's attention needs the keys of them all. So it is with every prompt with vision tokens where
    their number decides what they take: the same image would have other keys beside another one.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._rules = rules_of(self.vllm_config)
        self._prompts: WeakKeyDictionary[Request, Prompt] = WeakKeyDictionary()
        self._counts = Counts()
        coordinator = self.kv_cache_manager.coordinator
        stock = coordinator.cache_blocks

        def cache_blocks(request: Request, num_computed_tokens: int) -> None:
            if self._has_own_blocks(request):
                num_computed_tokens = min(num_computed_tokens, self._prompt(request).vision[0][0])
            stock(request, num_computed_tokens)

        coordinator.cache_blocks = cache_blocks

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        for new in output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            if request.num_preemptions == 0:
                prompt = self._prompt(request)
                self._counts.add(self._rules.config, prompt)
                if prompt.dense:
                    logger.warning_once("fastmmoe: a prompt is not pruned: %s", DENSE[prompt.dense])
        return output

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self._counts.send(stats)
        return stats

    def _prompt(self, request: Request) -> Prompt:
        prompt = self._prompts.get(request)
        if prompt is None:
            prompt = self._prompts[request] = read_prompt(
                self._rules, request.num_prompt_tokens, request.mm_features, request.sampling_params
            )
        return prompt

    def _has_own_blocks(self, request: Request) -> bool:
        """Whether its blocks with vision tokens are none that another prompt has."""
        prompt = self._prompt(request)
        return prompt.prunes or bool(prompt.vision) and self._rules.config.min_vision_tokens > 0

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple:
        if self._has_own_blocks(request):
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
        return super()._get_local_prefix_cache_hit(request)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple:
        found = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, shift_computed_tokens
        )
        prompt = self._prompt(request)
        if prompt.prunes and num_computed_tokens + found[1] < prompt.length:
            # the images that it found cached are not held while it waits: others may need the room
            self.encoder_cache_manager.free(request)
            return [], 0, encoder_compute_budget, [], []
        return found


class ImageScheduler(WholeImages, Scheduler):
    pass


class AsyncImageScheduler(WholeImages, AsyncScheduler):
    pass


def image_scheduler(**kwargs: Any) -> SchedulerInterface:
    """For `--scheduler-cls`: the scheduler of either kind."""
    is_async = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (AsyncImageScheduler if is_async else ImageScheduler)(**kwargs)
