"""FastMMoE's operations: tensors in, tensors out. No model knowledge; importing needs neither a GPU nor Triton."""

from fastmmoe_kernels.attention import last_query_attention
from fastmmoe_kernels.budget import choose_experts
from fastmmoe_kernels.experts import moe_experts
from fastmmoe_kernels.layout import PrunePlan, VisionLayout, prune_plan
from fastmmoe_kernels.prune import PrunedBatch, PruneOutput, prune_batch, prune_tokens
from fastmmoe_kernels.redundancy import window_redundancy
from fastmmoe_kernels.routing import GateOutput, RoutingOutput, gate_routing, topk_routing

__all__ = [
    "GateOutput",
    "PruneOutput",
    "PrunePlan",
    "PrunedBatch",
    "RoutingOutput",
    "VisionLayout",
    "choose_experts",
    "gate_routing",
    "last_query_attention",
    "moe_experts",
    "prune_batch",
    "prune_plan",
    "prune_tokens",
    "topk_routing",
    "window_redundancy",
]
