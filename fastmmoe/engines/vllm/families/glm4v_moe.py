"""GLM-4.5V and GLM-4.6V."""

from vllm.model_executor.models.glm4_1v import Glm4vMoeForConditionalGeneration

from fastmmoe.engines.vllm.model import ReducedModel


class ReducedGlm4vMoe(ReducedModel, Glm4vMoeForConditionalGeneration):
    pass
