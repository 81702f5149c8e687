"""Ways to reduce a prefill, one per file: its config, how it prunes, and how the study compares it (`study_entries`).

`METHODS` lists the configs that `fastmmoe.enable` takes, in the order in which the study shows them. All but the first
are written from other papers' definitions, to compare with, and combine with fewer experts per vision token
(`vision_top_k`).
"""

from fastmmoe.methods.fastmmoe import FastMMoEConfig
from fastmmoe.methods.fastv import FastVConfig
from fastmmoe.methods.modes import MoDESConfig
from fastmmoe.methods.random import RandomConfig
from fastmmoe.methods.sparsevlm import SparseVLMConfig
from fastmmoe.methods.uniform import UniformConfig

METHODS = (FastMMoEConfig, FastVConfig, SparseVLMConfig, MoDESConfig, UniformConfig, RandomConfig)

__all__ = ["METHODS", *(config.__name__ for config in METHODS)]
