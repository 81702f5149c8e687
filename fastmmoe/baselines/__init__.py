"""Other ways to prune vision tokens, to compare FastMMoE with: `fastmmoe.enable(model, FastVConfig(layer=2))`.

Written from the papers' definitions. Each combines with FastMMoE's expert reduction (`vision_top_k`).
"""

from fastmmoe.baselines.base import BaselineConfig
from fastmmoe.baselines.blind import RandomConfig, UniformConfig
from fastmmoe.baselines.fastv import FastVConfig
from fastmmoe.baselines.sparsevlm import SparseVLMConfig

__all__ = ["BaselineConfig", "FastVConfig", "RandomConfig", "SparseVLMConfig", "UniformConfig"]
