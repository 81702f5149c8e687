"""A tiny model and a batch of every family, and where its parity with an oracle is tested; by `Family.name`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from . import tiny_families
from .naive_loop import Parts
from .tiny import tiny_batch, tiny_internvl
from .tiny_deepseek import tiny_deepseek_batch, tiny_deepseek_vl2
from .tiny_families import IMAGE, IS_5_17, VIDEO


@dataclass(frozen=True)
class TinyFamily:
    """How tests make a family's models.

    Attributes:
        model: () -> a float32 model in evaluation mode, of layers enough to prune at layers 1 and 3.
        batch: the model -> inputs of two samples of different length, with images.
        prune_layers: where its tests prune; empty where the family may not.
        parity: module of `tests/model` that compares an enabled model with an oracle.
    """

    model: Callable[..., torch.nn.Module]
    batch: Callable[[torch.nn.Module], dict[str, torch.Tensor]]
    parity: str
    prune_layers: tuple[int, ...] = (1, 3)


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
        second_turn: whether the stock model answers one on a cache.
    """

    parts: Parts = Parts()
    experts: bool = True
    prune_layers: tuple[int, ...] = (1, 3)
    positions: bool = False
    batch: bool = True
    placeholders: tuple[int, ...] = (IMAGE, VIDEO)
    tolerance: float = 2e-5
    second_turn: bool = True


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
    "qwen3_omni_moe_thinker": LoopFamily(Parts(text="model") if IS_5_17 else Parts()),
    "qwen3_5_moe": LoopFamily(prune_layers=(3,), tolerance=5e-3),
    "glm4v_moe": LoopFamily(Parts(scoring="sigmoid")),
    "kimi_k25": LoopFamily(Parts(scoring="sigmoid")),
    "ernie4_5_vl_moe": LoopFamily(
        Parts(gate="vision_moe.gate", vision_gate=True, per_token=("moe_mm_token_type_ids",)),
        second_turn=not IS_5_17,
    ),
    "aria": LoopFamily(Parts(gate="router")),
    "llama4": LoopFamily(
        Parts(text="language_model.model", moe="feed_forward", gate="router", scoring="sigmoid", logits=1),
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


PROMPTS = (((5, 6), (7, 8, 9)), ((5, 6, 31), (17, 18), (27, 28, 29, 30)))  # text around the images

# by the names in `tiny_families.FAMILIES`, to those of the registry
TYPES = {
    "internvl_qwen3_moe": "internvl+qwen3_moe",
    "internvl_gpt_oss": "internvl+gpt_oss",
    "mistral3_mistral4": "mistral3+mistral4",
    "lfm2_vl_lfm2_moe": "lfm2_vl+lfm2_moe",
    "qwen3_vl_moe": "qwen3_vl_moe+qwen3_vl_moe_text",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe_thinker+qwen3_omni_moe_text",
    "qwen3_5_moe": "qwen3_5_moe+qwen3_5_moe_text",
    "glm4v_moe": "glm4v_moe+glm4v_moe_text",
    "kimi_k25": "kimi_k25+deepseek_v3",
    "ernie4_5_vl_moe": "ernie4_5_vl_moe+ernie4_5_vl_moe_text",
    "aria": "aria+aria_text",
    "llama4": "llama4+llama4_text",
    "minimax_m3_vl": "minimax_m3_vl+minimax_m3_vl_text",
    "step3p7": "step3p7+step3p5",
    "deepseek_ocr2": "deepseek_ocr2+deepseek_ocr2_text",
    "unlimited_ocr": "unlimited_ocr+unlimited_ocr_text",
    "dots3_note": "dots3_note+dots3_note_text",
    "muse_spark": "muse_spark+muse_spark_text",
    "mistral_large4": "mistral_large4+mistral_large4_text",
    "gemma4": "gemma4+gemma4_text",
    "glm5_next": "glm5_next+glm5_next_text",
    "qwen4_exp": "qwen4_exp+qwen4_exp_text",
    "inkling2": "inkling2+inkling2_text",
    "nemotron_h_omni": "nemotron_h_omni+nemotron_h",
}
LOOPS = {name: loop for name, loop in LOOPS.items() if name in tiny_families.FAMILIES}
ABSENT = {family for name, family in TYPES.items() if name in tiny_families.ABSENT}


def samples(name: str, seed: int = 0) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """(model, inputs of a prompt with one image and of one with two, as they are alone)."""
    model, one = tiny_families.FAMILIES[name](seed)
    image = one["input_ids"][0, len(tiny_families.HEAD) : -len(tiny_families.TAIL)].tolist()
    generator = torch.Generator().manual_seed(seed + 7)
    per_token = {key: one[key][0, len(tiny_families.HEAD)] for key in one if key.endswith("token_type_ids")}
    features = {key: one[key] for key in one if key not in ("input_ids", "attention_mask") and key not in per_token}
    made = []
    for texts in PROMPTS:
        ids = [*texts[0], *(token for text in texts[1:] for token in (*image, *text))]
        inputs = {"input_ids": torch.tensor([ids])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for key in per_token:
            wide = one[key][0, len(tiny_families.HEAD) : -len(tiny_families.TAIL)].tolist()
            inputs[key] = torch.tensor([[0] * len(texts[0]) + [t for s in texts[1:] for t in (*wide, *[0] * len(s))]])
        for key, value in features.items():
            drawn = [
                torch.randn(value.shape, generator=generator) if value.is_floating_point() else value for _ in texts[1:]
            ]
            inputs[key] = torch.cat(drawn)
        made.append(inputs)
    return model, made


def padded(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch of several samples, padded on the left."""
    width = max(part["input_ids"].shape[1] for part in parts)
    batch = {}
    for key in parts[0]:
        rows = [part[key] for part in parts]
        if rows[0].shape == parts[0]["input_ids"].shape:
            rows = [torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows]
        batch[key] = torch.cat(rows)
    return batch


def _tiny(name: str) -> TinyFamily:
    return TinyFamily(
        lambda: tiny_families.FAMILIES[name]()[0],
        lambda model: padded(samples(name)[1]),
        "test_parity_families",
        LOOPS[name].prune_layers,
    )


TINY = {TYPES[name]: _tiny(name) for name in LOOPS} | {
    "internvl+qwen3_moe": TinyFamily(tiny_internvl, tiny_batch, "test_parity_internvl"),
    "deepseek_vl_v2+deepseek_v2": TinyFamily(
        partial(tiny_deepseek_vl2, "small"), lambda model: tiny_deepseek_batch(), "test_parity_deepseek_vl2"
    ),
}
