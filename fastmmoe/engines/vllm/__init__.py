"""Reduced prefills inside stock vLLM, by its own plugin mechanism.

    vllm serve MODEL --additional-config '{"fastmmoe": {"retention": 0.5}}'
"""


def register() -> None:
    """Entry point of `vllm.general_plugins`, called in every process. Without that option every model stays stock.

    With it, models of other families are refused, and all in a vLLM of another minor version.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from fastmmoe.engines.vllm.families import FAMILIES
    from fastmmoe.engines.vllm.options import is_supported
    from fastmmoe.engines.vllm.startup import checked_before

    for architecture in ModelRegistry.get_supported_archs():
        MODELS_CONFIG_MAP[architecture] = checked_before(MODELS_CONFIG_MAP.get(architecture))
    if is_supported():
        for architecture, path in FAMILIES.items():
            ModelRegistry.register_model(architecture, path)
