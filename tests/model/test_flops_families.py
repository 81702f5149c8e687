"""FLOPs of every family: PyTorch's own counter on the tiny models, the released sizes, where presets prune."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from fastmmoe.cost.flops import flops
from fastmmoe.cost.prefill_time import prefill_time
from fastmmoe.families import ARCHITECTURES, FAMILIES, Family, architecture_of, find_text_model, plain_name
from fastmmoe.families.architecture import Layer, dense_layers
from fastmmoe.methods import FastMMoEConfig

from .test_flops import seen_squares
from .tiny_families import ABSENT
from .tiny_families import FAMILIES as TINY

# --- transformers' arithmetic beyond the convention -------------------------------------------------------------------


def attention_beyond(layer: Layer, n: int) -> int:
    """Eager attention and indexers multiply each query with every key, also those that a mask hides."""
    mixer = layer.mixer
    hidden = 2 * n * n - seen_squares(n, mixer.window, mixer.chunk)
    return hidden * mixer.pair + n * (n // mixer.index_pool) * mixer.index_pair


def convolution(channels: int, kernel: int) -> int:
    """It runs over a sequence padded at both ends."""
    return 2 * channels * kernel * (kernel - 1)


def delta_rule(heads: int, key: int, value: int, n: int, chunk: int = 64) -> int:
    """Chunked: products of a chunk's tokens with each other, and all of it for the padding of the last chunk.

    Those are two of the widths of keys and one of values, or the other way round, which here are of one size.
    """
    assert key == value
    chunks = -(-n // chunk)
    return 2 * heads * (chunks * chunk**2 * 3 * key + (chunks * chunk - n) * 3 * key * value)


def _lfm2(config: Any, i: int, n: int) -> int:
    return convolution(config.hidden_size, config.conv_L_cache) if config.layer_types[i] == "conv" else 0


def _qwen3_5(config: Any, i: int, n: int) -> int:
    if config.layer_types[i] != "linear_attention":
        return 0
    key, heads, value = config.linear_key_head_dim, config.linear_num_value_heads, config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * key + heads * value
    return convolution(channels, config.linear_conv_kernel_dim) + delta_rule(heads, key, value, n)


def _qwen4(config: Any, i: int, n: int) -> int:
    if config.layer_types[i] == "linear_attention":
        return _qwen3_5(config, i, n)
    # its indexer goes by query, and scores only the pools of keys in front of it
    ratio, pair = config.indexer_compress_ratio, config.indexer_n_heads * config.indexer_head_dim
    return 2 * pair * (sum((query + 1) // ratio for query in range(n)) - n * (n // ratio))


def _glm5(config: Any, i: int, n: int) -> int:
    if config.layer_types[i] != "linear_attention":
        return 0
    heads, width = config.linear_num_heads, config.linear_head_dim
    return convolution(3 * heads * width, config.linear_conv_kernel_dim) + delta_rule(heads, width, width, n)


def _llama4(config: Any, i: int, n: int) -> int:
    """Every expert runs on every token."""
    spared = config.num_local_experts - config.num_experts_per_tok
    return spared * n * 6 * config.hidden_size * config.intermediate_size


def _inkling2(config: Any, i: int, n: int) -> int:
    kernel, key_width = config.conv_kernel_size, config.num_key_value_heads * config.head_dim
    around = 2 * convolution(config.hidden_size, kernel)
    if config.layer_types[i] == "hybrid_sliding":
        return around + 2 * convolution(key_width, kernel)
    # convolutions with a kernel per token are elementwise products, which PyTorch does not count
    return around - 2 * n * 2 * key_width * kernel


def _nemotron(config: Any, i: int, n: int) -> int:
    if config.layer_types[i] != "linear_attention":
        return 0
    heads, width, state, chunk = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size, config.chunk_size
    chunks = -(-n // chunk)
    # a chunk's tokens with each other, the padding of the last chunk, and how chunks follow from those in front
    within = chunks * chunk**2 * (state + width) + (chunks * chunk - n) * 2 * width * state
    between = (chunks + 1) ** 2 * width * state
    channels = heads * width + 2 * config.n_groups * state
    return convolution(channels, config.conv_kernel) + 2 * heads * (within + between)


BEYOND: dict[str, Callable[[Any, int, int], int]] = {
    "lfm2_vl_lfm2_moe": _lfm2,
    "qwen3_5_moe": _qwen3_5,
    "qwen4_exp": _qwen4,
    "glm5_next": _glm5,
    "llama4": _llama4,
    "inkling2": _inkling2,
    "nemotron_h_omni": _nemotron,
}


def counted(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    """FLOPs per submodule name by PyTorch's own counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, use_cache=False)
    root = type(model).__name__
    return {name.removeprefix(root).lstrip("."): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


@pytest.mark.parametrize("name", TINY)
def test_dense_agrees_with_pytorchs_counter(name):
    model, inputs = TINY[name]()
    # plain matmuls: the counter knows neither grouped ones nor the CPU's flash attention
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    family, text_model, _ = find_text_model(model)
    path = next(path for path, module in model.named_modules() if module is text_model)
    by_layer, config = counted(model, inputs), text_model.config
    n = inputs["input_ids"].shape[1]
    # the marks around an image go through the experts of vision tokens too, where they have their own
    vision = inputs.get("moe_mm_token_type_ids", family.find_vision(model, inputs))
    n_vision = int(vision.sum())
    report, architecture = flops(model, n - n_vision, n_vision, FastMMoEConfig()), architecture_of(model)
    assert len(report.per_layer) == len(text_model.layers)
    for i, layer in enumerate(report.per_layer):
        beyond = attention_beyond(architecture.layers[i], n) + BEYOND.get(name, lambda *_: 0)(config, i, n)
        assert layer.dense == by_layer[f"{path}.layers.{i}"] - beyond, f"layer {i}"


@pytest.mark.parametrize("name", TINY)
def test_gates_that_choose_by_groups_are_known_from_the_config(name):
    model, _ = TINY[name]()
    family, text_model, _ = find_text_model(model)
    layers = [layer for layer in text_model.layers if family.is_moe(layer)]
    options = [
        family.routing_options(family.gate_of(layer), *family.gate_arguments(family.moe_of(layer))) for layer in layers
    ]
    (groups,) = {option.get("n_group", 1) for option in options}
    assert architecture_of(text_model.config).expert_groups == groups
    if groups > 1 and not family.expert_obstacle(text_model.config):
        for count in (flops, prefill_time):
            with pytest.raises(ValueError, match="expert_budget: not supported with this model's gate, which chooses"):
                count(model, 10, 60, FastMMoEConfig(expert_budget=6))


@pytest.mark.parametrize("name", TINY)
def test_a_reduced_prefill_saves(name):
    model, _ = TINY[name]()
    family, text_model, _ = find_text_model(model)
    config = text_model.config
    top_k = architecture_of(config).num_experts_per_tok
    assert top_k == getattr(config, family.top_k)
    fewer = {} if family.expert_obstacle(config) else {"vision_top_k": top_k // 2}
    prune = {"prune_layers": layers, "retention": 0.5} if (layers := family.preset_layers(config)) else {}
    plan = FastMMoEConfig(reduction_layer=1, **fewer, **prune)
    report = flops(model, 10, 60, plan)
    assert fewer or prune
    assert 0 < report.saved < 1
    assert report.per_layer[-1].moe_tokens == 10 + _left(plan, 60)
    for layer in report.per_layer:
        # a layer without experts saves where it sees fewer tokens, any other with fewer experts too
        has_experts = layer.layer not in dense_layers(config)
        pruned = bool(prune) and layer.layer > layers[0]
        if pruned or (fewer and has_experts and layer.layer >= 1):
            assert layer.reduced < layer.dense, f"layer {layer.layer}"


@pytest.mark.parametrize("name", ["llama4"])
def test_fewer_experts_are_refused_where_enabling_them_is(name):
    model, _ = TINY[name]()
    for sizes in (model, model.config, model.config.text_config, "llama-4-scout-17b-16e"):
        assert flops(sizes, 10, 60, FastMMoEConfig(prune_layers=(1,), retention=0.5)).saved > 0
        with pytest.raises(ValueError, match="cannot take fewer experts: every token takes one expert already"):
            flops(sizes, 10, 60, FastMMoEConfig(expert_budget=2))


def _left(plan: FastMMoEConfig, vision: int) -> int:
    for stage in range(len(plan.prune_layers)):
        vision = plan.vision_left(stage, vision)
    return vision


# --- released checkpoints ---------------------------------------------------------------------------------------------

QWEN3_30B = dict(
    num_hidden_layers=48, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
)  # fmt: skip
QWEN3_235B = QWEN3_30B | dict(
    num_hidden_layers=94, hidden_size=4096, num_attention_heads=64, moe_intermediate_size=1536
)
OCR = dict(
    num_hidden_layers=12, hidden_size=1280, num_attention_heads=10, num_key_value_heads=10, head_dim=128,
    n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=896, intermediate_size=6848, n_shared_experts=2,
    mlp_layer_types=["dense"] + ["sparse"] * 11,
)  # fmt: skip
KIMI = dict(n_group=1, n_routed_experts=384, num_attention_heads=64, num_key_value_heads=64, first_k_dense_replace=1)

# the text config of each, where it is not its type's default
RELEASED: dict[str, dict[str, Any]] = {
    "internvl3.5-30b-a3b": QWEN3_30B,
    "internvl3.5-241b-a28b": QWEN3_235B,
    "internvl3.5-gpt-oss-20b-a4b": dict(num_hidden_layers=24, num_local_experts=32),
    "deepseek-ocr-2": OCR,
    "unlimited-ocr": {},
    "qwen3-vl-30b-a3b": QWEN3_30B,
    "qwen3-vl-235b-a22b": QWEN3_235B,
    "qwen3-omni-30b-a3b": QWEN3_30B,
    "qwen3.5-35b-a3b": {},
    "qwen4-exp": {},
    "glm-4.5v": dict(head_dim=128),
    "glm-4.6v": dict(head_dim=128),
    "glm-5.3-flash": {},
    "kimi-k2.5": KIMI,
    "kimi-k2.6": KIMI,
    "ernie-4.5-vl-28b-a3b": {},
    "mistral-small-4-119b": {},
    "mistral-large-4-1t-a52b": {},
    "aria": dict(
        num_hidden_layers=28, hidden_size=2560, num_attention_heads=20, num_key_value_heads=20, head_dim=128,
        moe_num_experts=64, moe_topk=6, intermediate_size=1664,
    ),
    "llama-4-scout-17b-16e": {},
    "llama-4-maverick-17b-128e": dict(num_local_experts=128, interleave_moe_layer_step=2),
    "muse-spark-open-816b-a42b": {},
    "gemma-4-26b-a4b": dict(
        num_hidden_layers=30, hidden_size=2816, num_attention_heads=16, num_key_value_heads=8, head_dim=256,
        num_global_key_value_heads=2, global_head_dim=512, attention_k_eq_v=True, sliding_window=1024,
        enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704, intermediate_size=2112,
        hidden_size_per_layer_input=0,
    ),
    "minimax-m3": {},
    "step-3.7-flash": dict(
        layer_types=["full_attention" if i % 4 == 0 else "sliding_attention" for i in range(45)], sliding_window=512,
        num_sliding_attention_heads=96,
        rope_parameters=dict.fromkeys(
            ("full_attention", "sliding_attention"), {"rope_type": "default", "rope_theta": 1e4}
        ),
    ),
    "dots3-note-prev": {},
    "lfm2-8b-a1b": dict(
        num_hidden_layers=24,
        layer_types=["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)],
    ),
    "nemotron-3-nano-omni-30b-a3b": dict(
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", hidden_size=2688,
        num_key_value_heads=2, mamba_num_heads=64, n_routed_experts=128, num_experts_per_tok=6,
        moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712,
    ),
    "inkling-2-small": {},
}  # fmt: skip

# in 1e9: the parameters of their names, of which some count the embeddings, the vision tower or neither
PARAMETERS = {
    "internvl3.5-30b-a3b": (30, 3),
    "internvl3.5-241b-a28b": (235, 22),
    "internvl3.5-gpt-oss-20b-a4b": (20, 3.6),
    "qwen3.5-35b-a3b": (35, 3),
    "kimi-k2.5": (1026, 32),
    "mistral-small-4-119b": (119, 6),
    "mistral-large-4-1t-a52b": (1050, 52),
    "llama-4-scout-17b-16e": (107, 17),
    "llama-4-maverick-17b-128e": (400, 17),
    "muse-spark-open-816b-a42b": (816, 42),
    "gemma-4-26b-a4b": (25.2, 3.8),
    "lfm2-8b-a1b": (8.3, 1.5),
    "nemotron-3-nano-omni-30b-a3b": (31.6, 3.2),
}


def family_of(name: str) -> Family:
    return next(family for family in FAMILIES if name in family.architectures)


def released(name: str) -> Any:
    if family_of(name).parent_type in ABSENT:
        pytest.skip(f"this transformers does not have {name}")
    return AutoConfig.for_model(family_of(name).text_type, **RELEASED[name])


def test_every_usable_family_has_a_name_and_every_name_is_tested():
    assert [family.name for family in FAMILIES if not family.obstacle and not family.architectures] == []
    assert set(RELEASED) | {"deepseek-vl2-tiny", "deepseek-vl2-small", "deepseek-vl2"} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", RELEASED)
def test_a_named_architecture_is_its_checkpoints(name):
    assert ARCHITECTURES[name] == architecture_of(released(name))
    assert ARCHITECTURES[name] == architecture_of(SimpleNamespace(config=released(name)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_named_architecture_has_its_checkpoints_parameters(name):
    architecture = ARCHITECTURES[name]
    total, active = (
        sum(layer.mixer.weights + layer.mlp.weights + experts * layer.mlp.expert for layer in architecture.layers)
        for experts in (architecture.num_experts, architecture.num_experts_per_tok)
    )
    assert total / 1e9 == pytest.approx(PARAMETERS[name][0], rel=0.05)
    assert active / 1e9 == pytest.approx(PARAMETERS[name][1], rel=0.2)


@pytest.mark.parametrize("name", [name for name in RELEASED if plain_name(family_of(name).checkpoint).startswith(name)])
def test_a_preset_prunes_where_the_checkpoint_may(name):
    family, config = family_of(name), released(name)
    assert family.preset.prune_layers == family.preset_layers(config)
    assert family.preset.num_experts_per_tok == ARCHITECTURES[name].num_experts_per_tok
    for layer in family.preset.prune_layers:
        assert family.why_not_prune(config, layer) == ""
