"""FLOPs: the hand figures of the method, PyTorch's own counter on tiny models, batches, bad input."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3Model,
    Glm4MoeConfig,
    Glm4MoeModel,
    InternVLConfig,
    Qwen2MoeConfig,
    Qwen2MoeModel,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3MoeModel,
)

from fastmmoe.cost.flops import flops
from fastmmoe.cost.prefill_time import prefill_time
from fastmmoe.families import ARCHITECTURES, Architecture, architecture_of
from fastmmoe.families.architecture import Layer, Mixer, Mlp
from fastmmoe.methods import FastMMoEConfig
from fastmmoe.models.deepseek_vl2 import DeepseekVLV2Config
from fastmmoe.models.deepseek_vl2.text_model import DeepseekVLV2TextModel

from .tiny_deepseek import tiny_deepseek_vl2

INTERNVL = "internvl3.5-30b-a3b"
HALF_EXPERTS = FastMMoEConfig(vision_top_k=4, reduction_layer=2)
OFFICIAL_HALF = FastMMoEConfig(vision_top_k=4, reduction_layer=2, prune_layers=(5, 8, 12), retention=0.5)


# per layer and token: query and output 2 * 2048 * 4096 each, key and value 2 * 2048 * 512 each, gate 2 * 2048 * 128
HAND_PER_TOKEN = 2 * 2 * 2048 * 4096 + 2 * 2 * 2048 * 512 + 2 * 2048 * 128
HAND_PER_EXPERT = 6 * 2048 * 768
HAND_PER_SQUARE = 2 * 32 * 128


def test_hand_figure_dense():
    n = 100 + 1792
    by_hand = 48 * (n * HAND_PER_TOKEN + n * 8 * HAND_PER_EXPERT + n * n * HAND_PER_SQUARE)
    report = flops(INTERNVL, 100, 1792, FastMMoEConfig())
    assert report.dense == by_hand == pytest.approx(11.74e12, abs=0.005e12)
    assert report.reduced == by_hand and report.saved == 0.0
    assert len(report.per_layer) == 48


def test_hand_figure_half_experts():
    report = flops(INTERNVL, 100, 1792, HALF_EXPERTS)
    assert report.saved == pytest.approx(46 * 1792 * 4 * HAND_PER_EXPERT / report.dense)
    assert report.saved == pytest.approx(0.265, abs=0.0005)


def test_hand_figure_half_experts_and_half_tokens():
    # 1792 * 0.5 ** (1 / 3) = 1422.3, 1422 * 0.79370 = 1128.6, 1128 * 0.79370 = 895.3
    vision = [1792] * 5 + [1422] * 3 + [1128] * 4 + [895] * 36
    report = flops(INTERNVL, 100, 1792, OFFICIAL_HALF)
    assert [layer.moe_tokens for layer in report.per_layer] == [100 + v for v in vision]
    # attention still sees the tokens that its own layer's MoE no longer does
    assert [layer.attention_tokens for layer in report.per_layer] == [1892] + [100 + v for v in vision[:-1]]
    assert report.saved == pytest.approx(0.567, abs=0.0005)


def test_hand_figure_mla():
    """DeepSeek-VL2 (base): queries and keys of 128 + 64, values of 128, a latent of 512 and the 64 of all heads."""
    attention = 2560 * 32 * 192 + 2560 * (512 + 64) + 512 * 32 * (128 + 128) + 32 * 128 * 2560
    dense, expert, gate = 3 * 2560 * 12288, 3 * 2560 * 1536, 2560 * 72
    n = 100 + 1023
    per_square = 32 * (192 + 128)
    moe = attention + gate + (6 + 2) * expert
    by_hand = 2 * n * (attention + dense + 29 * moe) + 30 * n * n * per_square
    assert flops("deepseek-vl2", 100, 1023, FastMMoEConfig()).dense == by_hand
    half = flops("deepseek-vl2", 100, 1023, FastMMoEConfig(vision_top_k=3, reduction_layer=2))
    assert half.dense - half.reduced == 28 * 1023 * 3 * 2 * expert


@pytest.mark.parametrize(
    ("name", "language_config"),
    [
        # what the checkpoints' partial files hold; the rest are the official defaults
        (
            "deepseek-vl2-tiny",
            dict(hidden_size=1280, intermediate_size=6848, moe_intermediate_size=896, num_hidden_layers=12)
            | dict(num_attention_heads=10, num_key_value_heads=10, n_routed_experts=64, q_lora_rank=None, use_mla=False)
            | dict(kv_lora_rank=None, qk_nope_head_dim=0, qk_rope_head_dim=0, v_head_dim=0),
        ),
        (
            "deepseek-vl2-small",
            dict(hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27)
            | dict(num_attention_heads=16, q_lora_rank=None, n_routed_experts=64),
        ),
        (
            "deepseek-vl2",
            dict(hidden_size=2560, intermediate_size=12288, moe_intermediate_size=1536, q_lora_rank=None)
            | dict(n_routed_experts=72, scoring_func="sigmoid", topk_method="noaux_tc", n_group=1, topk_group=1),
        ),
    ],
)
def test_named_deepseek_vl2_is_its_checkpoint(name, language_config):
    common = dict(n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1)
    config = DeepseekVLV2Config(language_config=common | language_config)
    assert architecture_of(config) == ARCHITECTURES[name]
    plan = FastMMoEConfig.preset(config, retention=0.5)
    assert flops(f"deepseek-ai/{name}", 10, 421, plan) == flops(config, 10, 421, plan)


def tiny(cls, **more):
    # no two widths alike, so that none can be mistaken for another
    common = dict(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_experts_per_tok=3,
        moe_intermediate_size=20,
        intermediate_size=44,
        # eager: one plain matmul per hit expert and per attention product; PyTorch's counter knows neither
        # _grouped_mm nor the CPU's flash attention, and would leave them out without a word
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return cls(**(common | more))


def counted(module, *args, **kwargs) -> dict[str, int]:
    """FLOPs per submodule name by PyTorch's own counter, under "" those of the module itself."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    root = type(module).__name__
    return {name.removeprefix(root).lstrip("."): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


def acausal(config, n: int) -> int:
    """What PyTorch counts beyond the convention: it takes `4 n^2 heads head_dim` for scores and values (all n keys of
    every query), the convention only the causal half, `2 n^2 heads head_dim`. With MLA values have another width."""
    query = value = config.head_dim
    if getattr(config, "kv_lora_rank", None):
        query, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return n * n * config.num_attention_heads * (query + value)


MLA = dict(
    # this family calls the rotary part of a head head_dim
    **dict(num_key_value_heads=4, kv_lora_rank=14, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=22, head_dim=6),
    **dict(n_routed_experts=6, n_shared_experts=2, first_k_dense_replace=1, n_group=1, topk_group=1),
)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (Qwen3MoeModel, tiny(Qwen3MoeConfig, num_experts=6)),
        (Qwen3MoeModel, tiny(Qwen3MoeConfig, num_experts=6, mlp_only_layers=[1])),
        (Qwen3MoeModel, tiny(Qwen3MoeConfig, num_experts=6, decoder_sparse_step=2)),
        (Glm4MoeModel, tiny(Glm4MoeConfig, n_routed_experts=6, first_k_dense_replace=1, n_shared_experts=2)),
        (DeepseekV3Model, tiny(DeepseekV3Config, **MLA, q_lora_rank=None)),
        (DeepseekV3Model, tiny(DeepseekV3Config, **MLA, q_lora_rank=18)),
        (Qwen2MoeModel, tiny(Qwen2MoeConfig, num_experts=6, shared_expert_intermediate_size=28)),
    ],
    ids=[
        *("qwen3_moe", "mlp_only_layers", "decoder_sparse_step", "glm4_moe shared, first dense"),
        *("deepseek_v3", "deepseek_v3 with a latent of queries", "qwen2_moe shared"),
    ],
)
@pytest.mark.parametrize("n", [1, 17])
def test_dense_agrees_with_pytorchs_counter(model, config, n):
    by_layer = counted(model(config).eval(), torch.arange(n)[None])
    report = flops(config, n, 0, FastMMoEConfig())
    for layer in report.per_layer:
        expected = by_layer[f"layers.{layer.layer}"] - acausal(config, n)
        assert layer.dense == layer.reduced == expected


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_dense_deepseek_vl2_agrees_with_pytorchs_counter(variant):
    config = tiny_deepseek_vl2(variant, attn_implementation="eager").config.language_config
    config._experts_implementation = "eager"
    by_layer = counted(DeepseekVLV2TextModel(config).eval(), torch.arange(17)[None])
    for layer in flops(config, 17, 0, FastMMoEConfig()).per_layer:
        assert layer.dense == by_layer[f"layers.{layer.layer}"] - acausal(config, 17)


def test_reduced_agrees_with_pytorchs_counter():
    """Attention and MoE of each layer, run alone on as many tokens and experts as the plan says."""
    config = tiny(Qwen3MoeConfig, num_experts=6)
    n_text, n_vision = 5, 20
    plan = FastMMoEConfig(vision_top_k=1, reduction_layer=1, prune_layers=(0, 2), keep_ratios=(0.6, 0.5))
    attended, survived = [20, 12, 12], [12, 12, 6]
    report = flops(config, n_text, n_vision, plan)

    torch.manual_seed(0)
    model = Qwen3MoeModel(config).eval()
    for index, layer in enumerate(model.layers):
        n = n_text + attended[index]
        hidden = torch.randn(1, n, 32)
        positions = model.rotary_emb(hidden, torch.arange(n)[None])
        expected = counted(layer.self_attn, hidden, position_embeddings=positions, attention_mask=None)[""]
        expected -= acausal(config, n)
        n_moe = n_text + survived[index]
        ids = torch.arange(3).repeat(n_moe, 1)
        if index >= 1:
            ids[n_text:, 1:] = -1  # one expert per vision token
        expected += counted(layer.mlp.gate, torch.randn(n_moe, 32))[""]
        for expert in range(3):
            rows = (ids == expert).sum().item()
            expected += counted(model.layers[0].mlp.experts, torch.randn(rows, 32), *one_expert(rows))[""]
        assert report.per_layer[index].reduced == expected
        assert report.per_layer[index].attention_tokens == n
        assert report.per_layer[index].moe_tokens == n_moe
    assert report.reduced == sum(layer.reduced for layer in report.per_layer)
    assert report.saved == pytest.approx(1 - report.reduced / report.dense)


def one_expert(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing that sends every row to expert 0 alone."""
    return torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3000)).filter(any), min_size=1, max_size=4))
def test_a_batch_is_the_sum_of_its_samples(samples):
    batch = flops(INTERNVL, [t for t, _ in samples], [v for _, v in samples], OFFICIAL_HALF)
    alone = [flops(INTERNVL, t, v, OFFICIAL_HALF) for t, v in samples]
    assert batch.dense == sum(r.dense for r in alone)
    assert batch.reduced == sum(r.reduced for r in alone)
    assert batch.per_layer[12].moe_tokens == sum(r.per_layer[12].moe_tokens for r in alone)
    assert 0.0 <= batch.saved < 1.0
    assert all(r.saved == 0.0 for r, (_, v) in zip(alone, samples, strict=True) if v == 0)


def test_too_few_vision_tokens_are_not_reduced():
    """As in a forward: what counts is the whole batch, and what was measured goes before."""
    config = FastMMoEConfig(vision_top_k=4, prune_layers=(5, 8), retention=0.25, min_vision_tokens=600)
    without = replace(config, min_vision_tokens=0)
    for n in ([599], [299, 300]):
        few = flops(INTERNVL, [9] * len(n), n, config)
        assert few.saved == 0 and all(layer.reduced == layer.dense for layer in few.per_layer)
        assert prefill_time(INTERNVL, [9] * len(n), n, config).speedup == 1
    for n in ([600], [300, 300], [0]):
        assert flops(INTERNVL, [9] * len(n), n, config) == flops(INTERNVL, [9] * len(n), n, without)
    left = [[300], [150]]
    measured = flops(INTERNVL, 9, 599, config, vision_left=left)
    assert measured.saved > 0 and measured == flops(INTERNVL, 9, 599, without, vision_left=left)


def test_a_single_vision_token_is_never_pruned():
    plan = FastMMoEConfig(prune_layers=(0, 1), keep_ratios=(0.5, 0.01))
    tokens = [layer.moe_tokens for layer in flops(INTERNVL, 0, 2, plan).per_layer]
    assert tokens == [1] * 48


def test_what_text_config_may_be():
    text = Qwen3MoeConfig(
        num_hidden_layers=48, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, intermediate_size=6144,
    )
    expected = flops(ARCHITECTURES[INTERNVL], 100, 1792, OFFICIAL_HALF)
    composite = InternVLConfig(text_config=text)
    names = ["OpenGVLab/InternVL3_5-30B-A3B-HF", "Qwen/Qwen3-VL-30B-A3B-Instruct"]
    for given_config in [text, composite, SimpleNamespace(config=composite), *names]:
        assert flops(given_config, 100, 1792, OFFICIAL_HALF) == expected


def test_defaults_of_a_config_without_the_optional_attributes():
    config = SimpleNamespace(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, n_routed_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=20, intermediate_size=44, mlp_layer_types=["dense", "sparse"],
    )
    architecture = Architecture.from_config(config)
    mixer = Mixer(weights=4 * 32 * 32, pair=2 * 32, query=32, key=32, value=32, normed=64, norms=2, turned=64)
    dense = Mlp(weights=3 * 32 * 44, width=44)
    moe = Mlp(weights=32 * 6, expert=3 * 32 * 20, expert_width=20, expert_hidden=32)
    assert architecture == Architecture(32, 6, 2, (Layer(mixer, dense), Layer(mixer, moe)))
    assert Architecture.of(**vars(config)) == architecture


def seen_squares(n: int, window: int = 0, chunk: int = 0) -> int:
    """The convention's count in place of `n * n`: twice the pairs that a mask allows, less the diagonal once, of which
    with a window no more than the window."""
    chunk, query = chunk or max(n, 1), torch.arange(n)
    distance = query[:, None] - query
    mask = (distance >= 0) & (distance < (window or n)) & (query[:, None] // chunk == query // chunk)
    diagonal = sum(min(window or n, chunk, n - start) for start in range(0, n, chunk))
    return 2 * int(mask.sum()) - diagonal


@given(st.integers(0, 40), st.integers(0, 50), st.integers(0, 50))
def test_windows_and_chunks(n, window, chunk):
    assert Mixer(pair=3, window=window, chunk=chunk).flops(n) == 3 * seen_squares(n, window, chunk)
    assert Mixer(pair=3).flops(n) == 3 * n * n


def test_a_mixer_by_hand():
    mixer = Mixer(weights=5, state=7, pair=3, index_pair=11, index_pool=4)
    assert mixer.flops(10) == 2 * 10 * (5 + 7) + 100 * 3 + 10 * 2 * 11
    assert Mixer(pair=3, window=4).flops(10) == 3 * (2 * 10 * 4 - 4 * 4)
    assert Mixer(pair=3, chunk=4).flops(10) == 3 * (16 + 16 + 4)
    assert mixer.flops(0) == 0


def test_vision_tokens_have_experts_of_their_own():
    layer = Layer(Mixer(weights=1), Mlp(weights=10, expert=100), Mlp(weights=10, expert=1000))
    assert layer.flops([3], [5], 2, 12, 4) == 2 * (8 + 5 * 10 + 3 * 4 * 100 + 2 * 2 * 1000)


def test_layers_of_every_kind_see_fewer_tokens_behind_a_prune_layer():
    plan = FastMMoEConfig(prune_layers=(3,), retention=0.5)
    architecture = ARCHITECTURES["qwen3.5-35b-a3b"]
    report = flops(architecture, 10, 100, plan)
    for i in (4, 7):  # linear and full attention
        assert report.per_layer[i].reduced == architecture.layers[i].flops([10], [50], 50, 80, 400)
        assert report.per_layer[i].dense == architecture.layers[i].flops([10], [100], 100, 80, 800)
    # one linear layer by hand: q and k of 16 heads, v, z and o of 32, two numbers per head, a convolution of 4
    weights = 2048 * (2 * 16 * 128 + 3 * 32 * 128 + 2 * 32) + 4 * (2 * 16 * 128 + 32 * 128)
    moe = 2048 * 256 + 9 * 3 * 2048 * 512 + 2048
    assert report.per_layer[4].dense == 2 * 110 * (weights + 3 * 32 * 128 * 128 + moe)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny(SimpleNamespace, num_experts=6, layer_types=["ring"] * 3), "has layers of type 'ring', which is not"),
        (Qwen3Config(), "no experts"),
        ("internvl3.5-8b", "unknown name 'internvl3.5-8b', expected one of internvl3.5-30b-a3b"),
    ],
)
def test_an_architecture_that_is_not_counted(config, message):
    with pytest.raises(ValueError, match=f"^text_config: .*{message}"):
        flops(config, 1, 1, FastMMoEConfig())


@pytest.mark.parametrize(
    ("n_text", "n_vision", "error", "message"),
    [
        (-1, 5, ValueError, "n_text: expected token counts >= 0, got -1"),
        (5, [-2], ValueError, "n_vision: expected token counts >= 0, got -2"),
        ([5, 5], [5], ValueError, "n_vision: expected 2 samples"),
        (5, 2.5, TypeError, "n_vision: expected token counts, got 2.5"),
        (5, [2.0], TypeError, "n_vision: expected token counts, got 2.0"),
        (True, 5, TypeError, "n_text: expected token counts, got True"),
        (0, 0, ValueError, "at least one token"),
        ([], [], ValueError, "at least one token"),
    ],
)
def test_bad_counts(n_text, n_vision, error, message):
    with pytest.raises(error, match=message):
        flops(INTERNVL, n_text, n_vision, FastMMoEConfig())


def test_a_config_that_does_not_fit():
    with pytest.raises(TypeError, match="config: expected a FastMMoEConfig"):
        flops(INTERNVL, 1, 1, {})
    with pytest.raises(ValueError, match="prune_layers"):
        flops(INTERNVL, 1, 1, FastMMoEConfig(prune_layers=(48,), retention=0.5))
    with pytest.raises(ValueError, match="vision_top_k"):
        flops(INTERNVL, 1, 1, FastMMoEConfig(vision_top_k=9))
