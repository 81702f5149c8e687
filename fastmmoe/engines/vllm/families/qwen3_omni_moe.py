"""The thinker of Qwen3-Omni with experts."""

from vllm.model_executor.models.qwen3_omni_moe_thinker import Qwen3OmniMoeThinkerForConditionalGeneration

from fastmmoe.engines.vllm.families.deepstack import DeepStack
from fastmmoe.engines.vllm.model import ReducedModel


class ReducedQwen3OmniMoeThinker(DeepStack, ReducedModel, Qwen3OmniMoeThinkerForConditionalGeneration):
    pass
