"""The implementations of the experts that run against each other, all on the same tensors."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from roofline import ExpertsShape
from torch import nn
from workload import Routing, Weights, make_hidden, make_routing, make_weights, routing_logits

from fastmmoe_kernels import moe_experts

# a contestant: tokens [T, H] and a routing in, [T, H] out
Contestant = Callable[[torch.Tensor, Routing], torch.Tensor]
Loader = Callable[[Weights, ExpertsShape], Contestant]
OURS = "fastmmoe"


def our_experts(weights: Weights, backend: str) -> Contestant:
    return lambda hidden, routing: moe_experts(
        hidden, weights.gate_up, weights.down, routing.ids, routing.weights, backend=backend
    )


def our_tiles(shape: ExpertsShape, device: torch.device, dtype: torch.dtype, pairs: int):
    """The `ExpertTiles` that our experts take for so many slots."""
    from fastmmoe_kernels.experts.kernel import device_target
    from fastmmoe_kernels.experts.tiles import expert_tiles

    return expert_tiles(device_target(device), dtype, pairs / shape.experts, shape.hidden, shape.intermediate)


def _transformers_experts(weights: Weights, implementation: str) -> Contestant:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, hidden, intermediate = weights.down.shape
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = nn.Parameter(weights.gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(weights.down, requires_grad=False)

    # its own router hands over int64 ids, and weights in the tokens' dtype
    return lambda hidden, routing: module(hidden, routing.ids64, routing.weights16)


def _stock(implementation: str) -> Loader:
    return lambda weights, shape: _transformers_experts(weights, implementation)


def _sonic_moe(weights: Weights, shape: ExpertsShape) -> Contestant:
    from transformers.integrations.sonicmoe import is_sonicmoe_loadable

    is_sonicmoe_loadable(raise_error=True)
    return _transformers_experts(weights, "sonicmoe")


def _liger(weights: Weights, shape: ExpertsShape) -> Contestant:
    import liger_kernel.ops

    if weights.down.is_cuda:
        _compile_liger(shape, weights.down.device)
    return _liger_experts(weights, liger_kernel.ops.LigerFusedMoEFunction)


def _liger_experts(weights: Weights, function: type[torch.autograd.Function]) -> Contestant:
    return lambda hidden, routing: function.apply(
        hidden, weights.gate_up, weights.down, routing.ids, routing.weights16
    )  # fmt: skip


def _compile_liger(shape: ExpertsShape, device: torch.device) -> None:
    """Fill Triton's cache, in parallel, with the hundred configurations that Liger's first call tries one by one."""
    workers = min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for job in [pool.submit(_compile_liger_part, shape, device, part, workers) for part in range(workers)]:
            job.result()


def _compile_liger_part(shape: ExpertsShape, device: torch.device, part: int, parts: int) -> None:
    from liger_kernel.ops import fused_moe

    for name in ("_fused_up_proj_swiglu_kernel", "_fused_down_proj_kernel", "_token_gather_weighted_sum_kernel"):
        autotuner = getattr(fused_moe, name)
        autotuner.configs = autotuner.configs[part::parts]
    # what is compiled depends on H, I and K alone
    few = replace(shape, experts=max(shape.top_k))
    run = _liger_experts(make_weights(few, torch.bfloat16, device, 0), fused_moe.LigerFusedMoEFunction)
    hidden, logits = make_hidden(few, 64, torch.bfloat16, device, 0), routing_logits("uniform", 64, few.experts, 0)
    for top_k in shape.top_k:
        run(hidden, make_routing(logits, top_k, torch.bfloat16, device))


PEERS: dict[str, Loader] = {
    "grouped_mm": _stock("grouped_mm"),
    "eager": _stock("eager"),
    "sonicmoe": _sonic_moe,
    "liger": _liger,
}


def load_peers(
    names: Iterable[str], weights: Weights, shape: ExpertsShape
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those that work here, and why the others do not."""
    peers, skipped = {}, {}
    for name in names:
        try:
            peers[name] = PEERS[name](weights, shape)
        except Exception as reason:  # whatever is wrong with a peer, the others can run
            skipped[name] = f"{type(reason).__name__}: {reason}"
    return peers, skipped
