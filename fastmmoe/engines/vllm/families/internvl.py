"""InternVL (3.5) with a Qwen3-MoE text model, in transformers' own format."""

from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration

from fastmmoe.engines.vllm.model import ReducedModel


class ReducedInternVL(ReducedModel, InternS1ForConditionalGeneration):
    pass
