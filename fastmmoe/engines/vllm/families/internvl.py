"""InternVL (3.5) with a Qwen3-MoE text model, in transformers' own format."""

from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration

from fastmmoe.engines.vllm.families.qwen3_moe import qwen3_moe_layers
from fastmmoe.engines.vllm.model import ReducedModel
from fastmmoe.engines.vllm.prefill import Layers


class ReducedInternVL(ReducedModel, InternS1ForConditionalGeneration):
    def text_layers(self) -> Layers:
        return qwen3_moe_layers(self.language_model.model, self.config.text_config)
