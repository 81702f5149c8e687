"""Aria."""

from functools import cache
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import softmax_gate


@cache
def _ids_come_first() -> bool:
    import transformers

    return Version(transformers.__version__) < Version("5.21")


def _logits(output: tuple) -> torch.Tensor:
    return output[2 if _ids_come_first() else 0]


def _gate_output(gate: nn.Module, logits: torch.Tensor, routing: Any) -> tuple:
    output = (logits, routing.weights, routing.ids)
    return output[::-1] if _ids_come_first() else output


ARIA = Family(
    title="Aria",
    parent_type="aria",
    text_type="aria_text",
    norms_heads=False,
    placeholders=("image_token_index",),
    features=("pixel_values", "mm_encoder_outputs"),
    gate="router",
    routing_options=softmax_gate,
    gate_class="AriaTextTopKRouter",
    logits=_logits,
    gate_output=_gate_output,
    top_k="moe_topk",
    preset=Preset(
        supported="Aria (the name aria)",
        names=r"aria(-.*)?",
        num_experts_per_tok=6,
        prune_layers=(3, 5, 7),
    ),
    architectures={
        "aria": Architecture.of(
            norms_heads=False,
            num_hidden_layers=28,
            hidden_size=2560,
            num_attention_heads=20,
            num_key_value_heads=20,
            head_dim=128,
            moe_num_experts=64,
            moe_topk=6,
            intermediate_size=1664,
            moe_num_shared_experts=2,
        )
    },
    checkpoint="rhymes-ai/Aria",
)
