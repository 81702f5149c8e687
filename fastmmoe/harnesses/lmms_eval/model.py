"""The model that lmms-eval asks: batches of its tasks' chat messages, answered under any method."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from fastmmoe.config import ReductionConfig
from fastmmoe.families.checkpoint import load_model, read_config
from fastmmoe.families.fingerprint import gates_sha256
from fastmmoe.families.processors import load_processor
from fastmmoe.harnesses.answers import Answerer, Costs
from fastmmoe.harnesses.settings import read_method

# what tasks ask of `generate`; what they ask beside it is refused
GENERATION = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
UNUSED = ("until", "image_aspect_ratio")  # the latter for other models' processors
MAX_NEW_TOKENS = 128


class FastMMoE(lmms):
    """A supported checkpoint, dense or under a method.

    Args:
        pretrained: directory or hub id.
        method, settings: see `fastmmoe.harnesses.settings.read_method`.
        batch_size: prompts per batch.
        device, dtype: to run on and in; `device` "auto" is a GPU where there is one. Of several processes, each takes
            the GPU of its number.

    Raises:
        ValueError: arguments that are none, or do not fit the checkpoint.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_size: int | None = None,  # lmms-eval hands it to every model
        **settings: Any,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size: expected a number of prompts, got {batch_size!r}")
        self.batch_size = int(batch_size)
        if device in ("auto", "cuda"):
            # lmms-eval deals its documents out to the processes that a launcher started: each has a GPU and a model
            is_gpu = device == "cuda" or torch.cuda.is_available()
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if is_gpu else "cpu"
        self.device = torch.device(device)
        config = read_method(read_config(pretrained), method, settings)
        model = load_model(pretrained, dtype, device)
        self.answerer = Answerer(model, load_processor(pretrained))
        self.gates, self.config = gates_sha256(model), None
        self.use(config)

    def __repr__(self) -> str:
        """What the answers depend on: lmms-eval's cache keeps them under it."""
        return f"{type(self).__name__}({self.gates}, {self.answerer.model.dtype}, {self.config})"

    def use(self, config: ReductionConfig | None) -> None:
        """Reduce by this config from here on; None: nothing."""
        self.answerer.use(config)
        self.config = config

    def generate_until(self, requests: list[Instance]) -> Iterator[GenerationResult]:
        """Answers in the order of the requests.

        They come one by one, so that a cache of lmms-eval's (`--use_cache`) has every one that there is when a run is
        stopped. A request that fails stops the run: it is no wrong answer.
        """
        for request in requests:
            _generation(request)
        before = replace(self.answerer.costs)
        batches = list(self._batches(requests))
        with tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as bar:
            for number, batch in enumerate(batches):
                answers = self._answers(batch)
                if number + 1 == len(batches):  # nobody asks behind the last one
                    _log(self.answerer.costs - before)
                yield from answers
                bar.update(len(batch))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("fastmmoe: tasks that compare likelihoods are not supported, expected generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("fastmmoe: tasks of several rounds are not supported, expected generate_until")

    def _batches(self, requests: list[Instance]) -> Iterator[list[Instance]]:
        """Requests in their order; those of a batch ask for the same of `generate`."""
        for _, alike in itertools.groupby(requests, key=lambda request: request.args[2]):
            alike = list(alike)
            for start in range(0, len(alike), self.batch_size):
                yield alike[start : start + self.batch_size]

    def _answers(self, batch: list[Instance]) -> list[GenerationResult]:
        conversations = []
        for request in batch:
            _, messages_of, _, number, task, split = request.args
            messages = ChatMessages(messages=messages_of(self.task_dict[task][split][number]))
            if any(messages.extract_media()[1:]):
                raise ValueError(f"{task}, document {number}: holds videos or sounds, expected pictures")
            conversations.append(messages.to_hf_messages())
        answers = self.answerer.answer(conversations, **_generation(batch[0]))
        return [GenerationResult(one.text, TokenCounts(output_tokens=one.tokens)) for one in answers]


def _log(spent: Costs) -> None:
    """Tell lmms-eval what answers took."""
    log_metrics(
        total_elapsed_time=spent.seconds,
        total_gen_tokens=spent.tokens,
        avg_speed=spent.tokens / spent.seconds,
        additional_metrics={"total_requests": spent.prompts} | spent.per_prompt(),
    )


def _generation(request: Instance) -> dict[str, Any]:
    """What `generate` is told, of a task's `generation_kwargs`.

    Not where answers end (`until`): as with lmms-eval's own chat models, they end where the model ends them.
    """
    given = {name: value for name, value in request.args[2].items() if name not in UNUSED and value is not None}
    if unknown := [name for name in given if name not in GENERATION]:
        raise ValueError(
            f"{request.args[4]}: generation_kwargs {', '.join(f'{name}={given[name]!r}' for name in unknown)} not "
            f"supported, expected some of {', '.join(GENERATION)}"
        )
    generation = {"max_new_tokens": MAX_NEW_TOKENS} | given
    if not generation.get("do_sample", False) or generation.get("temperature", 1.0) == 0:
        generation = {n: value for n, value in generation.items() if n not in ("temperature", "top_p", "top_k")}
        generation["do_sample"] = False
    return generation
