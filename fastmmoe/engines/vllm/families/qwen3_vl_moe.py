"""Qwen3-VL with experts."""

from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration

from fastmmoe.engines.vllm.families.deepstack import DeepStack
from fastmmoe.engines.vllm.model import ReducedModel


class ReducedQwen3VLMoe(DeepStack, ReducedModel, Qwen3VLMoeForConditionalGeneration):
    pass
