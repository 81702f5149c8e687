"""DeepSeek-VL2 (tiny, small, base) for transformers 5: configuration, model, image processor and processor.

Importing this package registers them under `deepseek_vl_v2`, so that `AutoConfig`, `AutoModelForImageTextToText` and
`AutoProcessor` load the official checkpoints as they are.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from fastmmoe.models.deepseek_vl2 import checkpoint  # noqa: F401  registers the parameter names
from fastmmoe.models.deepseek_vl2.configuration import (
    DeepseekVLV2Config,
    DeepseekVLV2ProjectorConfig,
    DeepseekVLV2TextConfig,
    DeepseekVLV2VisionConfig,
)
from fastmmoe.models.deepseek_vl2.image_processing import DeepseekVLV2ImageProcessor
from fastmmoe.models.deepseek_vl2.modeling import DeepseekVLV2ForCausalLM, DeepseekVLV2Model
from fastmmoe.models.deepseek_vl2.processing import DeepseekVLV2Processor

AutoConfig.register(DeepseekVLV2Config.model_type, DeepseekVLV2Config)
AutoModelForImageTextToText.register(DeepseekVLV2Config, DeepseekVLV2ForCausalLM)
AutoProcessor.register(DeepseekVLV2Config, DeepseekVLV2Processor)

__all__ = [
    "DeepseekVLV2Config",
    "DeepseekVLV2ForCausalLM",
    "DeepseekVLV2ImageProcessor",
    "DeepseekVLV2Model",
    "DeepseekVLV2Processor",
    "DeepseekVLV2ProjectorConfig",
    "DeepseekVLV2TextConfig",
    "DeepseekVLV2VisionConfig",
]
