"""FastMMoE: faster prefill of multimodal mixture-of-experts models."""

# not lazy: the functions share their names with their modules, and a later import of the module would hide them
from fastmmoe.cost.flops import FlopsReport, flops
from fastmmoe.cost.prefill_time import TimeReport, prefill_time
from fastmmoe.enable import disable, enable, enabled, fixed_layout
from fastmmoe.methods import FastMMoEConfig, FastVConfig, MoDESConfig, RandomConfig, SparseVLMConfig, UniformConfig
from fastmmoe.prefill.packing import pack_batch
from fastmmoe.report import PrefillReport, StageReport, report
from fastmmoe.support import FamilySupport, families

__version__ = "0.1.0"

__all__ = [
    "FamilySupport",
    "FastMMoEConfig",
    "FastVConfig",
    "FlopsReport",
    "MoDESConfig",
    "PrefillReport",
    "RandomConfig",
    "SparseVLMConfig",
    "StageReport",
    "TimeReport",
    "UniformConfig",
    "disable",
    "enable",
    "enabled",
    "families",
    "fixed_layout",
    "flops",
    "pack_batch",
    "prefill_time",
    "report",
]
