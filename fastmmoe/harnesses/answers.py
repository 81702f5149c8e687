"""Conversations in batches, answered by a model as it stands, and what that took: times of the prefills, FLOPs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import fastmmoe
from fastmmoe.config import ReductionConfig
from fastmmoe.families import architecture_of, find_text_model
from fastmmoe.families.chat import end_tokens
from fastmmoe.methods import FastMMoEConfig
from fastmmoe.prefill.installation import plan_in_force
from fastmmoe_kernels import VisionLayout

Conversation = list[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What a model said: text without special tokens, and how many tokens."""

    text: str
    tokens: int


@dataclass
class Costs:
    """Sums over batches.

    Attributes:
        prompts: how many.
        tokens: said.
        seconds: of `generate`, vision tower and decoding included.
        first_token_seconds: from the start of `generate` to each batch's first token, vision tower included.
        prefill_seconds: of that, the language model's part.
        flops, dense_flops: of the language model's prefills, and of the dense model's. Batches without any picture
            count as dense, also where experts of text are skipped.
    """

    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    prefill_seconds: float = 0.0
    flops: float = 0.0
    dense_flops: float = 0.0

    def __add__(self, other: Costs) -> Costs:
        return Costs(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __sub__(self, other: Costs) -> Costs:
        return Costs(**{name: value - getattr(other, name) for name, value in vars(self).items()})

    def per_prompt(self) -> dict[str, float]:
        """Latencies and FLOPs of a prompt in the mean, `flops_ratio` of the dense model's; {} where none was answered.

        Latencies are shares of a batch's.
        """
        if not self.prompts:
            return {}
        return {
            "prefill_latency_s": self.prefill_seconds / self.prompts,
            "first_token_latency_s": self.first_token_seconds / self.prompts,
            "flops": self.flops / self.prompts,
            "flops_ratio": self.flops / self.dense_flops,
            "answered": self.prompts,
        }


class Answerer:
    """A model that answers batches of conversations; `costs` is what all of them took so far.

    Args:
        model: a supported model, in evaluation mode.
        processor: its processor, with a chat template. A tokenizer that names no padding pads with its end token.
    """

    def __init__(self, model: PreTrainedModel, processor: Any):
        if processor.tokenizer.pad_token is None:  # masked, whatever it is
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        self.model, self.processor = model, processor
        self.costs = Costs()
        self._is_cold = True

    def use(self, config: ReductionConfig | None) -> None:
        """Reduce by this config from here on; None: nothing.

        Raises: whatever `fastmmoe.enable` raises.
        """
        if config is not None:
            fastmmoe.enable(self.model, config)
        elif plan_in_force(self.model) is not None:
            fastmmoe.disable(self.model)
        self._is_cold = True

    @torch.inference_mode()
    def answer(self, conversations: Sequence[Conversation], **generation: Any) -> list[Answer]:
        """Answer a batch. The first one behind `use` is prefilled once more, in front, and not counted: it warms up.

        Args:
            conversations: in the chat template's form, pictures within as PIL images.
            generation: of `generate`: `max_new_tokens`, `do_sample`, `temperature`, ...

        Raises:
            ValueError: the template does not take a conversation.
        """
        inputs, ends = self._inputs(conversations), end_tokens(self.model, self.processor)
        options = {"eos_token_id": list(ends) or None, "pad_token_id": self.processor.tokenizer.pad_token_id}
        if self._is_cold:
            self.model.generate(**inputs, **options, **(generation | {"max_new_tokens": 1}))
            self._is_cold = False
        clock = _Clock(self.model.device)
        with clock.watching(find_text_model(self.model)[1]):
            tokens = self.model.generate(
                **inputs, **options, **generation, logits_processor=LogitsProcessorList([clock])
            )
        self._count(inputs, clock, generation.get("num_beams", 1))
        answers = [self._answer(row, ends) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]
        self.costs.tokens += sum(answer.tokens for answer in answers)
        return answers

    def _inputs(self, conversations: Sequence[Conversation]) -> Any:
        from jinja2 import TemplateError

        try:
            inputs = self.processor.apply_chat_template(
                list(conversations),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"text_kwargs": {"padding": True, "padding_side": "left"}},
            )
        except TemplateError as error:
            raise ValueError(f"model: its chat template does not take this conversation: {error}") from error
        return inputs.to(self.model.device, self.model.dtype)

    def _count(self, inputs: Any, clock: _Clock, beams: int) -> None:
        model, costs = self.model, self.costs
        family, text, parent = find_text_model(model)
        vision, mask = family.find_vision(parent, inputs), inputs.get("attention_mask")
        vision = torch.zeros_like(inputs["input_ids"], dtype=torch.bool) if vision is None else vision
        layout = VisionLayout.from_mask(vision, mask)
        if plan_in_force(model) is not None and any(layout.n_vision):
            counted = fastmmoe.report(model).flops  # of all beams
            reduced, dense = counted.reduced, counted.dense
        else:
            n_text = [length - n for length, n in zip(layout.lengths, layout.n_vision, strict=True)]
            architecture = architecture_of(text.config)
            reduced = dense = beams * fastmmoe.flops(architecture, n_text, layout.n_vision, FastMMoEConfig()).dense
        costs.flops, costs.dense_flops = costs.flops + reduced, costs.dense_flops + dense
        costs.prompts += len(layout.lengths)
        costs.seconds += clock.end - clock.start
        costs.first_token_seconds += clock.first_token - clock.start
        costs.prefill_seconds += clock.first_token - clock.prefill

    def _answer(self, tokens: list[int], ends: Sequence[int]) -> Answer:
        tokens = tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]
        return Answer(self.processor.decode(tokens, skip_special_tokens=True), len(tokens))


class _Clock(LogitsProcessor):
    """When `generate` began, the text model was first called, the first token's logits were there, and it ended."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start = self.prefill = self.first_token = self.end = 0.0

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def watching(self, text: torch.nn.Module) -> Iterator[None]:
        handle = text.register_forward_pre_hook(self._called)
        self.start = self.now()
        try:
            yield
        finally:
            self.end = self.now()
            handle.remove()

    def _called(self, module: torch.nn.Module, args: tuple) -> None:
        if not self.prefill:
            self.prefill = self.now()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.first_token:
            self.first_token = self.now()
        return scores
