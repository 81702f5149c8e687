"""An expert budget: which experts the vision tokens of a forward share, by what they ask for together (**ours**)."""

import torch

from fastmmoe_kernels.backend import resolve_backend
from fastmmoe_kernels.budget.reference import choose_experts_reference
from fastmmoe_kernels.checks import FLOATS, check_int, check_tensor
from fastmmoe_kernels.library import register

INDICES = (torch.int32, torch.int64)


def choose_experts(
    ids: torch.Tensor,
    weights: torch.Tensor,
    vision_mask: torch.Tensor,
    *,
    num_experts: int,
    budget: int,
    backend: str = "auto",
) -> torch.Tensor:
    """Choose the `budget` experts that vision tokens need most, for `topk_routing(vision_experts=...)`.

    An expert's demand is the sum of w^8 over the vision tokens that chose it, w being the weight with which they did:
    whom some token needs much goes before whom many need little. The experts of largest demand are chosen; ties go to
    the lower id. A NaN weight makes a demand the largest there is.

    Args:
        ids: int [T, K], what every token chooses among all experts; ids outside 0..E-1 choose none.
        weights: floating [T, K], with which weight: probabilities, not normalised over a token's choice.
        vision_mask: bool [T], true at the tokens that share the budget, over all samples of a batch.
        num_experts: E.
        budget: B, how many are chosen, in 1..E.
        backend: "auto", "triton" or "torch".

    Returns:
        bool [E], B of them true.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype, device or range; names the argument.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    check_tensor("ids", ids, ("T", "K"), INDICES)
    check_tensor("weights", weights, tuple(ids.shape), FLOATS, ids.device)
    check_tensor("vision_mask", vision_mask, (ids.shape[0],), (torch.bool,), ids.device)
    check_int("num_experts", num_experts, 1)
    check_int("budget", budget, 1, num_experts)
    return _choose_experts(ids, weights, vision_mask, num_experts, budget, resolve_backend(backend, ids))


def _fake(ids, weights, vision_mask, num_experts, budget):
    return ids.new_empty(num_experts, dtype=torch.bool)


_choose_experts = register(
    "choose_experts", choose_experts_reference, "fastmmoe_kernels.budget.kernel:choose_experts_triton", _fake
)
