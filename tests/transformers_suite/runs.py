"""What a run changes about every model that a test builds. No test may notice, and what is computed stays the same."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import Cache, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.prefill.experts import NAME, fastmmoe_experts
from fastmmoe.prefill.installation import plan_in_force
from fastmmoe.prefill.plan import Plan

from .upstream import test_modeling_common

# how far from eager experts, as a share of the largest value
EXPERTS_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class OurExperts:
    """`experts_implementation="fastmmoe"` unless a test asks for another; each call is compared with eager experts."""

    def setUp(self) -> None:
        super().setUp()
        stock = PreTrainedModel.get_correct_experts_implementation

        def choose(model: PreTrainedModel, requested: str | None) -> str:
            return stock(model, NAME if requested is None else requested)

        def experts(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
            self.ran_ours = True
            got, want = fastmmoe_experts(module, *args), type(module).forward.__wrapped__(module, *args)
            tolerance = EXPERTS_TOLERANCE[want.dtype] * want.abs().max().item()
            torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
            return got

        self.enterContext(patch.object(PreTrainedModel, "get_correct_experts_implementation", choose))
        self.enterContext(patch.dict(ALL_EXPERTS_FUNCTIONS._global_mapping, {NAME: experts}))
        # where a test compares transformers' implementations, ours takes the place of one
        self.enterContext(patch.object(test_modeling_common, "grouped_mm_experts_forward", experts))


class Enabled:
    """Enabled as long as a model is in evaluation mode; what it returns is compared with the stock model."""

    config: ClassVar[FastMMoEConfig]
    plans: Sequence[Plan] = ()

    def setUp(self) -> None:
        super().setUp()
        self.plans = []
        self.enterContext(patch.object(PreTrainedModel, "train", self._train()))
        for model_class in self.all_model_classes:
            self.enterContext(patch.object(model_class, "__call__", self._call()))

    @property
    def ran_ours(self) -> bool:
        return any(plan.last is not None for plan in self.plans)

    def _train(self) -> Callable:
        stock = PreTrainedModel.train

        def train(model: PreTrainedModel, mode: bool = True) -> PreTrainedModel:
            stock(model, mode)
            if type(model) in self.all_model_classes:
                if mode:
                    fastmmoe.disable(model)
                else:
                    fastmmoe.enable(model, self.config)
                    self.plans.append(plan_in_force(model))
            return model

        return train

    def _call(self) -> Callable:
        is_inside = False

        def call(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            nonlocal is_inside
            # a second call would write into a cache that the first one was given
            if is_inside or plan_in_force(model) is None or kwargs.get("past_key_values") is not None:
                return nn.Module.__call__(model, *args, **kwargs)
            is_inside = True
            try:
                got = nn.Module.__call__(model, *args, **kwargs)
                fastmmoe.disable(model)
                want = nn.Module.__call__(model, *args, **kwargs)
                fastmmoe.enable(model, self.config)
            finally:
                is_inside = False
            torch.testing.assert_close(_tensors(got), _tensors(want), atol=1e-4, rtol=1e-4)
            return got

        return call


class NothingReduced(Enabled):
    """All experts, no stage."""

    config = FastMMoEConfig(vision_top_k=2)


class NothingPruned(Enabled):
    """A stage at each layer, which keeps all tokens."""

    config = FastMMoEConfig(prune_layers=(0, 1), retention=1.0)


def _tensors(output: Any) -> list[torch.Tensor]:
    """Those of a model's output and of the cache in it."""
    leaves = tree_leaves(output)
    caches = [leaf for leaf in leaves if isinstance(leaf, Cache)]
    cached = [tensor for cache in caches for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] + cached
