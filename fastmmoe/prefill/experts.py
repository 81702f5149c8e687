"""Experts that run on the choice of `routing.py`: by this package's grouped GEMMs, or the model's own, pair by pair.

Also `experts_implementation="fastmmoe"`, the grouped GEMMs behind transformers' ExpertsInterface.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fastmmoe.prefill.expert_form import ExpertForm, expert_form

NAME = "fastmmoe"

_FORMS: WeakKeyDictionary[nn.Module, ExpertForm] = WeakKeyDictionary()


def fastmmoe_experts(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls under `experts_implementation="fastmmoe"`.

    Raises:
        ValueError: experts that `moe_experts` does not know, see `expert_form`.
    """
    form = _FORMS.get(experts)
    if form is None:
        form = _FORMS[experts] = expert_form(experts)
    return form.run(experts, hidden_states, top_k_index, top_k_weights, "auto")


def run_pairs(
    experts: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
    pairs: int,
) -> torch.Tensor:
    """Run a model's own experts on one row per token and active expert.

    Args:
        experts: (hidden [P, H], ids int64 [P, 1], weights [P, 1]) -> [P, H].
        hidden: [T, H].
        ids: int [T, K], inactive slots hold `num_experts`.
        weights: [T, K].
        pairs: how many slots are active at most; the host knows it from the layout, and need not wait for the device.

    Returns:
        [T, H] in hidden's dtype.
    """
    num_tokens, top_k = ids.shape
    active = (ids >= num_experts).flatten().byte().argsort(stable=True)[:pairs]  # [P]
    chosen = ids.flatten()[active].long().unsqueeze(1)  # [P, 1]
    rows = experts(
        hidden[active // top_k], chosen.clamp_max(num_experts - 1), weights.flatten()[active].unsqueeze(1)
    )
    rows = rows.masked_fill(chosen >= num_experts, 0.0)
    slots = rows.new_zeros(num_tokens * top_k, rows.shape[1]).index_copy_(0, active, rows)
    return slots.view(num_tokens, top_k, -1).sum(1)


ALL_EXPERTS_FUNCTIONS.register(NAME, fastmmoe_experts)
