"""What a run changes about every model that a test builds; no test may notice."""

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


class OurExperts:
    """`experts_implementation="fastmmoe"`, unless a test asks for another one."""

    def setUp(self) -> None:
        super().setUp()
        stock = PreTrainedModel.get_correct_experts_implementation

        def choose(model: PreTrainedModel, requested: str | None) -> str:
            return stock(model, NAME if requested is None else requested)

        def experts(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
            self.ran_ours = True
            return fastmmoe_experts(module, *args)

        self.enterContext(patch.object(PreTrainedModel, "get_correct_experts_implementation", choose))
        self.enterContext(patch.dict(ALL_EXPERTS_FUNCTIONS._global_mapping, {NAME: experts}))
        # where transformers' implementations are compared, ours takes the place of one
        self.enterContext(patch.object(test_modeling_common, "grouped_mm_experts_forward", experts))


class Enabled:
    """Enabled as soon as a model is in evaluation mode, for as long as it is."""

    config: ClassVar[FastMMoEConfig]
    plans: Sequence[Plan] = ()

    def setUp(self) -> None:
        super().setUp()
        self.plans = []
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

        self.enterContext(patch.object(PreTrainedModel, "train", train))
        for cls in self.all_model_classes:
            self.enterContext(patch.object(cls, "__call__", self.compared))

    @property
    def compared(self) -> Callable:
        """A model's call that also compares what it returns with what the stock model does."""
        depth = 0

        def call(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                got = nn.Module.__call__(model, *args, **kwargs)
                if depth == 1 and kwargs.get("past_key_values") is None and plan_in_force(model) is not None:
                    fastmmoe.disable(model)
                    try:
                        want = nn.Module.__call__(model, *args, **kwargs)
                    finally:
                        model.eval()
                    torch.testing.assert_close(_tensors(got), _tensors(want), atol=1e-4, rtol=1e-4)
                return got
            finally:
                depth -= 1

        return call

    @property
    def ran_ours(self) -> bool:
        return any(plan.last is not None for plan in self.plans)


class NothingReduced(Enabled):
    """All experts, no stage."""

    config = FastMMoEConfig(vision_top_k=2)


class NothingPruned(Enabled):
    """A stage at each layer, which keeps all tokens."""

    config = FastMMoEConfig(prune_layers=(0, 1), retention=1.0)


def _tensors(output: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(output)
    caches = [leaf for leaf in leaves if isinstance(leaf, Cache)]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] + [
        tensor for cache in caches for layer in cache.layers for tensor in (layer.keys, layer.values)
    ]
