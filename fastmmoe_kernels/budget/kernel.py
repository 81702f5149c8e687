"""The expert budget in Triton: partial sums of what blocks of tokens ask for, then every expert's rank.

No atomics: sums have one order, so that the same tokens always choose the same experts.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from fastmmoe_kernels.grid import cdiv
from fastmmoe_kernels.variant import KernelVariant

TOKENS = 256  # per program; fewer would be more partial sums, which every program of the second kernel reads
EXPERTS = 32  # per program of the second kernel, and per step in it
INF = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["num_tokens"])
def expert_demand_kernel(
    ids_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    vision_ptr,  # [T]
    demand_ptr,  # [blocks, E] out
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    expert = tl.arange(0, BLOCK_E)[None, :]  # [1, BE]
    demand = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, TOKENS, BLOCK_T):
        row = tl.program_id(0).to(tl.int64) * TOKENS + start + tl.arange(0, BLOCK_T)  # [BT]
        in_rows = row < num_tokens
        counts = in_rows & (tl.load(vision_ptr + row, mask=in_rows, other=0) != 0)
        for k in tl.static_range(K):
            chosen = tl.load(ids_ptr + row * K + k, mask=counts, other=-1)
            weight = tl.load(weights_ptr + row * K + k, mask=counts, other=0.0).to(tl.float32)
            weight *= weight
            weight *= weight
            weight *= weight
            demand += tl.where(expert == chosen[:, None], weight[:, None], 0.0)
    total = tl.sum(demand, axis=0)[None, :]
    tl.store(demand_ptr + tl.program_id(0).to(tl.int64) * E + expert, total, mask=expert < E)


@triton.jit
def _total(demand_ptr, expert, num_blocks, E: tl.constexpr, EXPERTS: tl.constexpr):
    """Demand of some experts over all blocks, in the order of the blocks; -inf past E."""
    total = tl.zeros((EXPERTS,), tl.float32)
    pointers = demand_ptr + expert
    for _ in range(0, num_blocks):
        total += tl.load(pointers, mask=expert < E, other=0.0)
        pointers += E
    total = tl.where(total == total, total, INF)  # NaN equals nothing
    return tl.where(expert < E, total, float("-inf"))


@triton.jit(do_not_specialize=["num_blocks", "budget"])
def expert_rank_kernel(
    demand_ptr,  # [blocks, E]
    chosen_ptr,  # [E] out
    num_blocks,
    budget,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    own = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)  # [BE]
    mine = _total(demand_ptr, own, num_blocks, E, EXPERTS)
    rank = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, E, EXPERTS):
        other = start + tl.arange(0, EXPERTS)
        theirs = _total(demand_ptr, other, num_blocks, E, EXPERTS)[None, :]
        goes_before = (theirs > mine[:, None]) | ((theirs == mine[:, None]) & (other[None, :] < own[:, None]))
        rank += tl.sum(goes_before.to(tl.int32), axis=1)
    tl.store(chosen_ptr + own, rank < budget, mask=own < E)


def choose_experts_triton(
    ids: torch.Tensor,  # [T, K]
    weights: torch.Tensor,  # [T, K]
    vision_mask: torch.Tensor,  # [T]
    num_experts: int,
    budget: int,
) -> torch.Tensor:
    num_tokens, top_k = ids.shape
    chosen = ids.new_empty(num_experts, dtype=torch.bool)
    num_blocks = cdiv(num_tokens, TOKENS)
    demand = weights.new_empty(num_blocks, num_experts, dtype=torch.float32)
    if num_tokens:
        expert_demand_kernel[(num_blocks,)](
            ids.contiguous(), weights.contiguous(), vision_mask.contiguous(), demand, num_tokens,
            E=num_experts, K=top_k, TOKENS=TOKENS, **demand_blocks(num_experts),
        )  # fmt: skip
    expert_rank_kernel[(cdiv(num_experts, EXPERTS),)](
        demand, chosen, num_blocks, budget, E=num_experts, EXPERTS=EXPERTS
    )
    return chosen


@cache
def demand_blocks(num_experts: int) -> dict[str, int]:
    """About 512 sums per program, in registers: with twice as many, some spill."""
    block_e = triton.next_power_of_2(num_experts)
    return {"BLOCK_T": min(TOKENS, max(1, 512 // block_e)), "BLOCK_E": block_e}


def aot_variants() -> list[KernelVariant]:
    """Every shipped configuration, for `python -m fastmmoe_kernels.aot`."""
    variants = []
    for num_experts, top_k in ((128, 8), (64, 6), (72, 6), (256, 8), (384, 8)):
        for weights in ("*fp32", "*bf16"):
            signature = {
                "ids_ptr": "*i32", "weights_ptr": weights, "vision_ptr": "*u1", "demand_ptr": "*fp32",
                "num_tokens": "i32",
            }  # fmt: skip
            constants = {"E": num_experts, "K": top_k, "TOKENS": TOKENS} | demand_blocks(num_experts)
            variants.append(KernelVariant(expert_demand_kernel, signature, constants))
        signature = {"demand_ptr": "*fp32", "chosen_ptr": "*u1", "num_blocks": "i32", "budget": "i32"}
        variants.append(KernelVariant(expert_rank_kernel, signature, {"E": num_experts, "EXPERTS": EXPERTS}))
    return variants
