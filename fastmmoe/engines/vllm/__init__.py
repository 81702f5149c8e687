"""Reduced prefills inside stock vLLM, by its own plugin mechanism.

    vllm serve MODEL --additional-config '{"fastmmoe": {"retention": 0.5}}'
"""


def register() -> None:
    """Entry point of `vllm.general_plugins`, called in every process. Without that option every model stays stock."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from fastmmoe.engines.vllm.families import FAMILIES
    from fastmmoe.engines.vllm.startup import checked_before

    for architecture, path in FAMILIES.items():
        MODELS_CONFIG_MAP[architecture] = checked_before(MODELS_CONFIG_MAP.get(architecture))
        ModelRegistry.register_model(architecture, path)
