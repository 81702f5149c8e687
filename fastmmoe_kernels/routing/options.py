"""What the routing ops take beside the logits, or beside what they come from."""

from typing import NamedTuple

import torch

from fastmmoe_kernels.checks import FLOATS, check_choice, check_float, check_int, check_tensor

SCORINGS = ("softmax", "sigmoid")


class RoutingOptions(NamedTuple):
    """The options of `topk_routing`, which says what they mean, for T tokens and E experts.

    `library.register` flattens them: their order and types are the schema of both ops.
    """

    vision_mask: torch.Tensor | None  # bool [T]
    padding_mask: torch.Tensor | None  # bool [T]
    skip_below: torch.Tensor | None  # float32 [2]
    exempt_mask: torch.Tensor | None  # bool [T]
    vision_experts: torch.Tensor | None  # bool [E]
    correction_bias: torch.Tensor | None  # floating [E]
    top_k: int
    vision_top_k: int  # `top_k` where the caller gave none
    scoring: str
    norm_topk_prob: bool
    n_group: int
    topk_group: int
    group_best: int | None
    routed_scaling_factor: float
    renormalize: bool
    return_probs: bool

    def scores_per_group(self, num_experts: int) -> int:
        """How many of a group's best scores make its own."""
        if self.group_best is None:
            return 1 if self.correction_bias is None else min(2, num_experts // self.n_group)
        return self.group_best

    def check(self, num_tokens: int, num_experts: int, device: torch.device) -> None:
        """Refuse an option of another type, shape, dtype, device or range."""
        top_k, vision_top_k, n_group, topk_group = self.top_k, self.vision_top_k, self.n_group, self.topk_group
        check_int("top_k", top_k, 1, num_experts)
        for name in ("vision_mask", "padding_mask", "exempt_mask"):
            if (mask := getattr(self, name)) is not None:
                check_tensor(name, mask, (num_tokens,), (torch.bool,), device)
        if self.skip_below is not None:
            check_tensor("skip_below", self.skip_below, (2,), (torch.float32,), device)
        elif self.exempt_mask is not None:
            raise ValueError("exempt_mask: expected None without skip_below, where nothing is skipped, got a mask")
        check_int("vision_top_k", vision_top_k, 1, top_k)
        if self.vision_mask is None and vision_top_k < top_k:
            raise ValueError(f"vision_mask: expected a mask with vision_top_k={vision_top_k}, got None")
        if self.vision_experts is not None:
            check_tensor("vision_experts", self.vision_experts, (num_experts,), (torch.bool,), device)
            if self.vision_mask is None:
                raise ValueError("vision_mask: expected a mask with vision_experts, got None")
            if n_group > 1:
                raise ValueError(f"vision_experts: not supported with groups, got n_group={n_group}")
        check_choice("scoring", self.scoring, SCORINGS)
        if self.correction_bias is not None:
            check_tensor("correction_bias", self.correction_bias, (num_experts,), FLOATS, device)
        check_int("n_group", n_group, 1, num_experts)
        if num_experts % n_group:
            raise ValueError(f"n_group: expected a divisor of the {num_experts} experts, got {n_group}")
        check_int("topk_group", topk_group, 1, n_group)
        if topk_group * (num_experts // n_group) < top_k:
            raise ValueError(
                f"topk_group: {topk_group} groups of {num_experts // n_group} experts hold fewer than top_k={top_k}"
            )
        if self.group_best is not None:
            check_int("group_best", self.group_best, 1, min(2, num_experts // n_group))
        check_float("routed_scaling_factor", self.routed_scaling_factor, 0.0, float("inf"), low_open=True)
