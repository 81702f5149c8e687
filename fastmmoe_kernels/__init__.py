"""FastMMoE's operations: tensors in, tensors out. No model knowledge; importing needs neither a GPU nor Triton."""

from fastmmoe_kernels.attention import last_query_attention
from fastmmoe_kernels.experts import moe_experts
from fastmmoe_kernels.layout import PrunePlan, VisionLayout, prune_plan
from fastmmoe_kernels.prune import PruneOutput, prune_tokens
from fastmmoe_kernels.redundancy import window_redundancy
from fastmmoe_kernels.routing import RoutingOutput, topk_routing

__all__ = [
    "PruneOutput",
    "PrunePlan",
    "RoutingOutput",
    "VisionLayout",
    "last_query_attention",
    "moe_experts",
    "prune_plan",
    "prune_tokens",
    "topk_routing",
    "window_redundancy",
]
