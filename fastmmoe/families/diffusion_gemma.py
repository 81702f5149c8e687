"""DiffusionGemma, which is refused."""

from fastmmoe.families.family import Family

DIFFUSION_GEMMA = Family(
    title="DiffusionGemma",
    parent_type="diffusion_gemma",
    text_type="diffusion_gemma_text",
    obstacle="it denoises blocks of tokens, which read the cache of the whole prompt again and again",
)
