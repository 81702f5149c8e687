"""Which layers of every family prune: the others are refused, and leave nothing on the model."""

from __future__ import annotations

import pytest
import torch

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.methods import FastVConfig, RandomConfig, UniformConfig

from ..families import LOOPS
from .families import FAMILIES, PRUNING, built, text_of

pytestmark = pytest.mark.usefixtures("no_gradients")

PRUNES = {
    "internvl_qwen3_moe": (0, 1, 2, 3, 4), "internvl_gpt_oss": (1, 3, 5), "mistral3_mistral4": (1, 2, 3, 4),
    "lfm2_vl_lfm2_moe": (1, 3, 5), "qwen3_vl_moe": (0, 1, 2, 3, 4, 5), "qwen3_omni_moe_thinker": (0, 1, 2, 3, 4, 5),
    "qwen3_5_moe": (3, 7), "glm4v_moe": (1, 2, 3, 4, 5), "kimi_k25": (1, 2, 3, 4), "ernie4_5_vl_moe": (1, 2, 3, 4),
    "aria": (0, 1, 2, 3, 4), "llama4": (3, 7), "minimax_m3_vl": (1, 2, 3, 4, 5), "step3p7": (2, 4),
    "deepseek_ocr2": (1, 2, 3, 4), "unlimited_ocr": (1, 2, 3, 4), "dots3_note": (1, 5), "muse_spark": (3, 7),
    "mistral_large4": (1, 3, 5),
}  # fmt: skip


def assert_untouched(model, inputs, stock):
    for module in model.modules():
        assert not {"forward", "__reduce_ex__"} & set(vars(module))
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_prunes_or_is_refused(name):
    model, inputs = built(name)
    stock, pruned = model(**inputs).logits, []
    for layer in range(len(text_of(name, model).layers)):
        try:
            with fastmmoe.enabled(model, FastMMoEConfig(prune_layers=(layer,), retention=0.5)):
                model(**inputs)
                assert sum(fastmmoe.report(model).tokens_per_layer[layer]) < inputs["input_ids"].shape[1]
            pruned.append(layer)
        except ValueError as error:
            assert str(error).startswith(f"prune_layers: layer {layer} ")
        assert_untouched(model, inputs, stock)
    assert tuple(pruned) == PRUNES.get(name, ())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in PRUNING])
def test_other_methods_are_refused_where_nothing_prunes(name):
    model, inputs = built(name)
    stock = model(**inputs).logits
    configs = (FastVConfig(layer=3), RandomConfig(prune_layers=(2,), retention=0.5),
               UniformConfig(prune_layers=(2,), retention=0.5))  # fmt: skip
    for config in configs:
        with pytest.raises(ValueError, match="prune_layers: layer 2 (of .* cannot prune|is not a MoE layer)"):
            fastmmoe.enable(model, config)
        assert_untouched(model, inputs, stock)


def test_fewer_experts_of_llama4_are_refused():
    model, inputs = built("llama4")
    stock = model(**inputs).logits
    with pytest.raises(ValueError, match="vision_top_k: Llama-4's vision tokens cannot take fewer experts"):
        fastmmoe.enable(model, FastMMoEConfig(vision_top_k=1))
    assert_untouched(model, inputs, stock)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "internvl_qwen3_moe"])
def test_a_preset_fits_its_model(name):
    model, inputs = built(name)
    stock = model(**inputs).logits
    for source in (model, model.config, model.config.get_text_config()):
        if name not in PRUNING:
            with pytest.raises(ValueError, match="retention=0.5: .* cannot prune"):
                FastMMoEConfig.preset(source, retention=0.5)
        config = FastMMoEConfig.preset(source, retention=0.5 if name in PRUNING else 1.0)
        assert set(config.prune_layers) <= set(PRUNES.get(name, ()))
        assert (config.vision_top_k is None) == (not LOOPS[name].experts)
    with fastmmoe.enabled(model, config):
        assert not torch.equal(model(**inputs).logits, stock)
    assert_untouched(model, inputs, stock)
