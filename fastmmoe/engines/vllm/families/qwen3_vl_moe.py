"""Qwen3-VL with experts."""

import torch
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration

from fastmmoe.engines.vllm.model import ReducedModel


class ReducedQwen3VLMoe(ReducedModel, Qwen3VLMoeForConditionalGeneration):
    def added_behind(self, num_tokens: int) -> dict[int, torch.Tensor]:
        deepstack = self._get_deepstack_input_embeds(num_tokens)
        return {} if deepstack is None else dict(enumerate(deepstack.tensors.values()))

    def clear_added(self, num_tokens: int) -> None:
        self._clear_deepstack_input_embeds(num_tokens)
