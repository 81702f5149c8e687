"""Fewer experts for vision tokens behind vLLM's MoE layers (method section 1): the choice, and the experts that run."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from fastmmoe.engines.vllm.prefill import Tokens
from fastmmoe_kernels import moe_experts, topk_routing
from fastmmoe_kernels.routing.options import SCORINGS


def routing_of(runner: MoERunner) -> dict[str, Any]:
    """The options of `topk_routing` under which it chooses what an MoE layer's stock router does.

    A scale that vLLM gives to the experts' sum instead of to the weights is none of them.

    Raises:
        ValueError: a router of a kind that is not known here.
    """
    router = runner.router
    known = isinstance(router, (FusedTopKRouter, FusedTopKBiasRouter, GroupedTopKRouter, CPURouter))
    own = getattr(router, "custom_routing_function", None) or getattr(router, "num_fused_shared_experts", 0)
    if not known or own or router.scoring_func not in SCORINGS:
        raise ValueError(f"{runner.layer_name} is not supported: it chooses experts in a way of its own")
    options = {"top_k": router.top_k, "scoring": router.scoring_func, "norm_topk_prob": router.renormalize}
    if not isinstance(router, FusedTopKRouter):
        options |= {
            "correction_bias": router.e_score_correction_bias,
            "routed_scaling_factor": float(router.routed_scaling_factor),
        }
    if isinstance(router, GroupedTopKRouter) or getattr(router, "use_grouped_topk", False):
        options |= {"n_group": router.num_expert_group, "topk_group": router.topk_group}
    return options


class VisionRouter(FusedMoERouter):
    """Chooses fewer experts for vision tokens while `tokens` says which these are; else the stock router.

    Inactive slots hold E, the number of experts: for `VisionExperts` alone.
    """

    def __init__(
        self,
        stock: FusedMoERouter,
        tokens: Callable[[], Tokens | None],
        vision_top_k: int,
        routing: Mapping[str, Any],
        backend: str,
    ):
        super().__init__(stock.eplb_state)
        self.stock, self._tokens = stock, tokens
        self._options = {"vision_top_k": vision_top_k, "backend": backend, **routing}

    def set_capture_fn(self, capture_fn: Callable[[torch.Tensor], None] | None) -> None:
        self.stock.set_capture_fn(capture_fn)

    @property
    def routing_method_type(self) -> Any:
        return self.stock.routing_method_type

    def _select_experts(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        topk_indices_dtype: torch.dtype | None = None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self._tokens()
        if tokens is None or not tokens.n_vision:
            return self.stock._select_experts(hidden_states, router_logits, topk_indices_dtype, input_ids=input_ids)
        routing = topk_routing(router_logits, vision_mask=tokens.vision, **self._options)
        return routing.weights, routing.ids


class VisionExperts:
    """Runs the experts of `VisionRouter`'s choice in place of a layer's `forward_modular`; nothing in empty slots.

    Shared experts are the runner's: without a kernel that overlaps them with its communication, it calls them itself.
    """

    def __init__(
        self, runner: MoERunner, tokens: Callable[[], Tokens | None], vision_top_k: int, top_k: int, backend: str
    ):
        self._experts, self._stock = runner.routed_experts, runner.routed_experts.forward_modular
        # weights of the CPU's kernel lie in an order of its own
        self._is_packed = runner.routed_experts.quant_method.unquantized_backend == UnquantizedMoeBackend.CPU
        self._tokens, self._vision_top_k, self._top_k, self._backend = tokens, vision_top_k, top_k, backend

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, **shared: Any) -> Any:
        tokens = self._tokens()
        if tokens is None or not tokens.n_vision:
            return self._stock(x=x, topk_weights=topk_weights, topk_ids=topk_ids, **shared)
        if self._is_packed:
            return self._by_kind(tokens, x, topk_weights, topk_ids)
        experts, others = self._experts, len(x) - tokens.n_vision
        return moe_experts(
            x,
            experts.w13_weight,
            experts.w2_weight,
            topk_ids,
            topk_weights,
            max_pairs=tokens.n_vision * self._vision_top_k + others * self._top_k,
            backend=self._backend,
        )

    def _by_kind(self, tokens: Tokens, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """By the stock kernel: vision tokens in fewer slots, then the others."""
        output = torch.empty_like(x)
        for rows, top_k in ((tokens.vision, self._vision_top_k), (~tokens.vision, self._top_k)):
            at = rows.nonzero().flatten()  # on a CPU alone: there is no device to wait for
            if len(at):
                part = self._stock(
                    x=x[at], topk_weights=weights[at, :top_k].contiguous(), topk_ids=ids[at, :top_k].contiguous()
                )
                output.index_copy_(0, at, part)
        return output


def reduce_experts(
    runner: MoERunner,
    tokens: Callable[[], Tokens | None],
    vision_top_k: int,
    backend: str,
) -> None:
    """Give vision tokens fewer experts in one MoE layer.

    Raises:
        ValueError: experts whose kernel or weights, or a gate whose way of choosing, are not known here.
    """
    obstacle = _obstacle(runner)
    if obstacle:
        raise ValueError(f"vision_top_k={vision_top_k}: {runner.layer_name} is not supported: {obstacle}")
    routing = routing_of(runner)
    # compiled code of a CPU would look into the router at the time of its compilation
    shared = runner._shared_experts is not None
    runner._forward_entry = torch.ops.vllm.moe_forward_shared if shared else torch.ops.vllm.moe_forward
    runner.router = VisionRouter(runner.router, tokens, vision_top_k, routing, backend)
    runner.routed_experts.forward_modular = VisionExperts(runner, tokens, vision_top_k, routing["top_k"], backend)


def _obstacle(runner: MoERunner) -> str:
    experts, method = runner.routed_experts, runner.routed_experts.quant_method
    if not isinstance(method, UnquantizedFusedMoEMethod):
        return f"its experts are quantized ({type(method).__name__}); leave vision_top_k at null"
    if method.unquantized_backend not in (UnquantizedMoeBackend.TRITON, UnquantizedMoeBackend.CPU):
        return f"its experts run on {method.unquantized_backend.value}, expected --moe-backend triton"
    if method.is_monolithic:
        return "its kernel chooses experts by itself"
    if experts.activation != MoEActivation.SILU or method.moe.has_bias or experts.apply_router_weight_on_input:
        return f"its experts have another form than silu(gate) * up without biases ({experts.activation.value})"
    return ""
