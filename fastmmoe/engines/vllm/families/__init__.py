"""Model families as vLLM has them, one file each: architecture -> the class that takes its place."""

FAMILIES = {
    "Qwen3VLMoeForConditionalGeneration": f"{__name__}.qwen3_vl_moe:ReducedQwen3VLMoe",
    "InternVLForConditionalGeneration": f"{__name__}.internvl:ReducedInternVL",
    "Glm4vMoeForConditionalGeneration": f"{__name__}.glm4v_moe:ReducedGlm4vMoe",
    "AriaForConditionalGeneration": f"{__name__}.aria:ReducedAria",
    "Qwen3OmniMoeForConditionalGeneration": f"{__name__}.qwen3_omni_moe:ReducedQwen3OmniMoeThinker",
}
