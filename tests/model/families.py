"""A tiny model and a batch of every family, and where its parity with an oracle is tested; by `Family.name`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .naive_loop import Parts
from .tiny import tiny_batch, tiny_internvl
from .tiny_deepseek import tiny_deepseek_batch, tiny_deepseek_vl2
from .tiny_families import IMAGE, VIDEO


@dataclass(frozen=True)
class TinyFamily:
    """How tests make a family's models.

    Attributes:
        model: () -> a float32 model in evaluation mode, of layers enough to prune at layers 1 and 3.
        batch: the model -> inputs of two samples of different length, with images.
        parity: module of `tests/model` that compares an enabled model with an oracle.
    """

    model: Callable[..., torch.nn.Module]
    batch: Callable[[torch.nn.Module], dict[str, torch.Tensor]]
    parity: str


TINY = {
    "internvl+qwen3_moe": TinyFamily(tiny_internvl, tiny_batch, "test_parity_internvl"),
    "deepseek_vl_v2+deepseek_v2": TinyFamily(
        partial(tiny_deepseek_vl2, "small"), lambda model: tiny_deepseek_batch(), "test_parity_deepseek_vl2"
    ),
}


@dataclass(frozen=True)
class LoopFamily:
    """How a family of `tiny_families.py` is compared with `naive_loop.py`.

    Attributes:
        parts: where its layers keep what the loop touches.
        experts: whether vision tokens may take fewer.
        prune_layers: where the tests prune; empty where the family may not.
        positions: the model needs position ids to tell padding from text.
        batch: whether a padded batch is what its samples are alone, in the stock model too.
        placeholders: ids of vision tokens.
        tolerance: absolute, of the logits.
    """

    parts: Parts = Parts()
    experts: bool = True
    prune_layers: tuple[int, ...] = (1, 3)
    positions: bool = False
    batch: bool = True
    placeholders: tuple[int, ...] = (IMAGE, VIDEO)
    tolerance: float = 2e-5


def _config_top_k(gate: torch.nn.Module, k: int) -> None:
    gate.config.top_k_experts = k


def _capped(model: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    config = model.config.text_config
    cap = getattr(config, "final_logit_softcapping", None) or model.final_logit_softcapping
    return cap * torch.tanh(model.lm_head(hidden) * getattr(config, "output_multiplier", 1.0) / cap)


LOOPS = {
    "internvl_qwen3_moe": LoopFamily(),
    "internvl_gpt_oss": LoopFamily(Parts(gate="router")),
    "mistral3_mistral4": LoopFamily(positions=True),
    "lfm2_vl_lfm2_moe": LoopFamily(
        Parts(norm="ffn_norm", moe="feed_forward", scoring="sigmoid", final_norm="embedding_norm")
    ),
    "qwen3_vl_moe": LoopFamily(prune_layers=(0, 2)),
    "qwen3_omni_moe_thinker": LoopFamily(),
    "qwen3_5_moe": LoopFamily(prune_layers=(3,), tolerance=5e-3),
    "glm4v_moe": LoopFamily(Parts(scoring="sigmoid")),
    "kimi_k25": LoopFamily(Parts(scoring="sigmoid")),
    "ernie4_5_vl_moe": LoopFamily(
        Parts(gate="vision_moe.gate", vision_gate=True, per_token=("moe_mm_token_type_ids",))
    ),
    "aria": LoopFamily(Parts(gate="router")),
    "llama4": LoopFamily(
        Parts(text="language_model.model", moe="feed_forward", gate="router", scoring="sigmoid"),
        experts=False,
        prune_layers=(3,),
    ),
    "minimax_m3_vl": LoopFamily(Parts(scoring="sigmoid", slot_positions=True), batch=False),
    "step3p7": LoopFamily(Parts(scoring="sigmoid"), prune_layers=(2, 4)),
    "deepseek_ocr2": LoopFamily(Parts(normalised=False)),
    "unlimited_ocr": LoopFamily(Parts(normalised=False)),
    "dots3_note": LoopFamily(Parts(scoring="sigmoid"), prune_layers=(1, 5)),
    "muse_spark": LoopFamily(
        Parts(
            norm="pre_feedforward_layernorm",
            scoring="sigmoid",
            head=_capped,
            finish=lambda layer, residual, output: layer.post_feedforward_residual_gate(
                residual, layer.post_feedforward_layernorm(output)
            ),
        ),
        prune_layers=(3,),
        tolerance=5e-3,
    ),
    "mistral_large4": LoopFamily(Parts(head=_capped), positions=True, prune_layers=(1, 3)),
    "gemma4": LoopFamily(Parts(moe="", gate="router", scoring="none", top_k=_config_top_k), prune_layers=()),
    "glm5_next": LoopFamily(Parts(scoring="sigmoid"), prune_layers=(), batch=False),
    "qwen4_exp": LoopFamily(prune_layers=(), batch=False),
    "inkling2": LoopFamily(Parts(scoring="sigmoid"), prune_layers=()),
    "nemotron_h_omni": LoopFamily(
        Parts(text="language_model.model", norm="norm", moe="mixer", scoring="sigmoid"), prune_layers=()
    ),
}
