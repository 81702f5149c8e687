"""FastMMoEConfig: what it accepts, what it refuses and how it says so, presets, environment, JSON."""

import dataclasses
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Glm4MoeConfig, InternVLConfig, Qwen3Config, Qwen3MoeConfig

from fastmmoe.methods import FastMMoEConfig
from fastmmoe.methods.fastmmoe import PresetTooDeepError, fitting_layers
from fastmmoe.models.deepseek_vl2 import DeepseekVLV2Config


def internvl(**text) -> InternVLConfig:
    return InternVLConfig(text_config=Qwen3MoeConfig(**text))


def test_default_reduces_nothing():
    config = FastMMoEConfig()
    assert config.vision_top_k is None
    assert config.prune_layers == () and config.stage_keep_ratios == ()
    assert (config.merge_ratio, config.window, config.alpha, config.reduction_layer) == (0.025, 3, 0.5, 2)
    assert (config.strategy, config.merge_method, config.backend) == ("hybrid", "mlerp", "auto")


def test_frozen_and_hashable():
    config = FastMMoEConfig(prune_layers=[1, 2], retention=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 0.1
    assert hash(config) == hash(FastMMoEConfig(prune_layers=(1, 2), retention=0.5))


def test_values_are_normalised():
    config = FastMMoEConfig(
        vision_top_k=np.int64(4), prune_layers=[np.int32(1), 3], keep_ratios=[1, np.float64(0.5)], alpha=1
    )
    assert config == FastMMoEConfig(vision_top_k=4, prune_layers=(1, 3), keep_ratios=(1.0, 0.5), alpha=1.0)
    assert type(config.vision_top_k) is int and type(config.prune_layers[0]) is int
    assert type(config.alpha) is float and [type(r) for r in config.keep_ratios] == [float, float]


# the example of method section 2.1: 0.75 over three stages is 0.91 each
def test_retention_is_spread_over_the_stages():
    ratios = FastMMoEConfig(prune_layers=(5, 8, 12), retention=0.75).stage_keep_ratios
    assert [round(r, 2) for r in ratios] == [0.91, 0.91, 0.91]
    assert np.prod(ratios) == pytest.approx(0.75)


def test_keep_ratios_are_the_stages():
    assert FastMMoEConfig(prune_layers=(0, 4), keep_ratios=(0.5, 0.25)).stage_keep_ratios == (0.5, 0.25)


def test_steepness_by_hand():
    # 0.8 * 0.4 * 0.2 = 0.064
    config = FastMMoEConfig(prune_layers=(1, 3, 5), retention=0.064, steepness=0.5)
    assert config.stage_keep_ratios == pytest.approx((0.8, 0.4, 0.2))
    assert FastMMoEConfig(prune_layers=(2,), retention=0.3, steepness=0.5).stage_keep_ratios == pytest.approx((0.3,))
    assert FastMMoEConfig(steepness=0.5).stage_keep_ratios == ()
    with pytest.raises(ValueError, match="steepness=0.5 with retention=0.5 over 3 stages.*keep 1.587"):
        FastMMoEConfig(prune_layers=(1, 3, 5), retention=0.5, steepness=0.5)
    with pytest.raises(ValueError, match="steepness=0.9: expected 1.0 with keep_ratios"):
        FastMMoEConfig(prune_layers=(1,), keep_ratios=(0.5,), steepness=0.9)
    with pytest.raises(ValueError, match="steepness"):
        FastMMoEConfig(steepness=0.0)


BAD = [
    ("vision_top_k", 0, ValueError),
    ("vision_top_k", True, TypeError),
    ("vision_top_k", 4.0, TypeError),
    ("reduction_layer", -1, ValueError),
    ("reduction_layer", None, TypeError),
    ("prune_layers", (8, 5), ValueError),
    ("prune_layers", (5, 5), ValueError),
    ("prune_layers", (-1, 5), ValueError),
    ("prune_layers", (False, 5), TypeError),
    ("prune_layers", "5,8", TypeError),
    ("prune_layers", 5, TypeError),
    ("retention", 0.0, ValueError),
    ("retention", 1.5, ValueError),
    ("retention", float("nan"), ValueError),
    ("retention", True, TypeError),
    ("retention", "0.5", TypeError),
    ("keep_ratios", (0.5, 0.0), ValueError),
    ("keep_ratios", (0.5, float("inf")), ValueError),
    ("keep_ratios", 0.5, TypeError),
    ("merge_ratio", -0.1, ValueError),
    ("merge_ratio", 1.1, ValueError),
    ("merge_ratio", float("nan"), ValueError),
    ("alpha", 1.1, ValueError),
    ("alpha", None, TypeError),
    ("alpha", np.bool_(True), TypeError),
    ("window", 0, ValueError),
    ("window", 2**30 + 1, ValueError),
    ("window", 3.0, TypeError),
    ("strategy", "random", ValueError),
    ("strategy", None, TypeError),
    ("merge_method", "slerp", ValueError),
    ("backend", "cuda", ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD, ids=[f"{n}={v}" for n, v, _ in BAD])
def test_a_bad_value_is_named(name, value, error):
    values = {"prune_layers": (5, 8), name: value}
    with pytest.raises(error, match=rf"^{name}(\[\d\])?: expected .*, got "):
        FastMMoEConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prune_layers": (5, 8), "retention": 0.5, "keep_ratios": (0.5, 0.5)}, "got both"),
        ({"prune_layers": (5, 8), "keep_ratios": (0.5,)}, "got 1 for 2"),
        ({"keep_ratios": (0.5,)}, "got 1 for 0"),
        ({"keep_ratios": ()}, "silently do nothing"),
        ({"retention": 0.5}, "silently do nothing"),
    ],
)
def test_a_bad_combination_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FastMMoEConfig(**values)


def test_check_model():
    config = FastMMoEConfig(vision_top_k=4, prune_layers=(1, 5), retention=0.5)
    config.check_model(6, 4)
    with pytest.raises(ValueError, match=r"prune_layers=\(1, 5\): the model has 5 layers"):
        config.check_model(5, 4)
    with pytest.raises(ValueError, match="vision_top_k=4: expected at most the model's 3"):
        config.check_model(6, 3)
    with pytest.raises(ValueError, match="reduction_layer=6: .* silently do nothing"):
        FastMMoEConfig(vision_top_k=2, reduction_layer=6).check_model(6, 4)
    # nothing is reduced, so where it would start does not matter
    FastMMoEConfig(vision_top_k=4, reduction_layer=6).check_model(6, 4)
    FastMMoEConfig(reduction_layer=6).check_model(6, 4)


INTERNVL_HALF = FastMMoEConfig(
    vision_top_k=4, reduction_layer=2, prune_layers=(5, 8, 12), retention=0.5, merge_ratio=0.025, alpha=0.5
)


@pytest.mark.parametrize(
    "name",
    [
        "internvl",
        "InternVL3.5",
        "internvl3.5-30b-a3b",
        "OpenGVLab/InternVL3_5-30B-A3B-HF",
        "/models/InternVL3_5-30B-A3B-HF/",
        "InternVL3_5-241B-A28B-Instruct",
    ],
)
def test_preset_by_name(name):
    assert FastMMoEConfig.preset(name, retention=0.5) == INTERNVL_HALF


def test_preset_of_deepseek_vl2_by_name():
    assert FastMMoEConfig.preset("deepseek-ai/deepseek-vl2-small", retention=0.5) == FastMMoEConfig(
        vision_top_k=3, prune_layers=(2, 5, 8), retention=0.5, merge_ratio=0.05, alpha=0.3
    )


def test_preset_of_deepseek_vl2_by_config():
    text = dict(num_hidden_layers=9, n_routed_experts=8, num_experts_per_tok=4)
    config = FastMMoEConfig.preset(DeepseekVLV2Config(language_config=text), retention=0.5)
    want = FastMMoEConfig.preset("deepseek-vl2", retention=0.5)
    assert config == dataclasses.replace(want, vision_top_k=2)


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: c.text_config, lambda c: SimpleNamespace(config=c)])
def test_preset_takes_k_from_the_model(wrap):
    model = wrap(internvl(num_experts_per_tok=6, num_hidden_layers=13))
    assert FastMMoEConfig.preset(model, retention=0.5) == dataclasses.replace(INTERNVL_HALF, vision_top_k=3)


def test_preset_without_retention_prunes_nothing():
    config = FastMMoEConfig.preset(internvl(num_hidden_layers=4, num_experts_per_tok=1))
    assert config == FastMMoEConfig(vision_top_k=1)


def test_preset_that_does_not_fit_says_what_to_give():
    with pytest.raises(ValueError, match=r"\(5, 8, 12\).*12 layers.*0 to 11.*give prune_layers"):
        FastMMoEConfig.preset(internvl(num_hidden_layers=12), retention=0.5)
    config = FastMMoEConfig.preset(internvl(num_hidden_layers=12), retention=0.5, prune_layers=(3, 7))
    assert config.prune_layers == (3, 7) and config.retention == 0.5


@pytest.mark.parametrize(
    ("text", "fitting"),
    [({"mlp_only_layers": [1, 2]}, (3, 4, 5)), ({"decoder_sparse_step": 2}, (1, 3, 5))],
)
def test_layers_without_experts_fit_no_preset(text, fitting):
    model = internvl(num_hidden_layers=8, **text)
    with pytest.raises(PresetTooDeepError) as error:
        FastMMoEConfig.preset(model, retention=0.5)
    assert error.value.fitting == fitting and fitting_layers(model, 8) == fitting


@pytest.mark.parametrize(("depth", "fitting"), [(12, (1, 2, 3)), (8, (1, 2, 3)), (4, (1, 2)), (3, (1,)), (2, ())])
def test_preset_that_does_not_fit_names_layers_that_do(depth, fitting):
    model = internvl(num_hidden_layers=depth)
    with pytest.raises(PresetTooDeepError) as error:
        FastMMoEConfig.preset(model, retention=0.5, vision_top_k=99)  # which is not what is wrong here alone
    assert error.value.fitting == fitting
    assert ("retention=1.0" if not fitting else f"that fit this model: {fitting}") in str(error.value)
    copied = pickle.loads(pickle.dumps(error.value))
    assert (str(copied), copied.fitting) == (str(error.value), fitting)
    if fitting:
        assert FastMMoEConfig.preset(model, retention=0.5, prune_layers=fitting).prune_layers == fitting


@pytest.mark.parametrize("name", ["internvl3.5", "deepseek-vl2"])
def test_preset_that_keeps_by_redundancy_trusts_routing_more(name):
    paper = FastMMoEConfig.preset(name, retention=0.5)
    kept = FastMMoEConfig.preset(name, retention=0.5, keep_by="redundancy")
    assert kept == dataclasses.replace(paper, keep_by="redundancy", alpha=0.75) and paper.alpha < 0.75
    assert FastMMoEConfig.preset(name, retention=0.5, keep_by="redundancy", alpha=0.5).alpha == 0.5
    assert FastMMoEConfig.preset(name, retention=0.5, keep_by="importance") == paper


def test_preset_overrides():
    config = FastMMoEConfig.preset("internvl3.5", keep_ratios=(0.9, 0.8, 0.7), vision_top_k=2)
    assert config.stage_keep_ratios == (0.9, 0.8, 0.7) and config.prune_layers == (5, 8, 12)
    assert config.vision_top_k == 2


@pytest.mark.parametrize(
    "model",
    ["internvl3.5-8b", "internvl3.5-38b", "llava", "", Glm4MoeConfig(), object()],
    ids=["dense size", "another dense size", "unknown", "empty", "other family", "no model"],
)
def test_preset_of_an_unknown_family(model):
    with pytest.raises(ValueError, match=r"no preset for .*InternVL3\.5.*DeepSeek-VL2"):
        FastMMoEConfig.preset(model, retention=0.5)


def test_preset_of_a_dense_text_model():
    with pytest.raises(ValueError, match="has no experts"):
        FastMMoEConfig.preset(InternVLConfig(text_config=Qwen3Config()))


def test_from_env_without_variables():
    assert FastMMoEConfig.from_env({"PATH": "/bin", "BASE_ALPHA": " "}) == FastMMoEConfig()


def test_from_env_reads_the_process_environment(monkeypatch):
    monkeypatch.setenv("BASE_ALPHA", "0.25")
    assert FastMMoEConfig.from_env().alpha == 0.25


def test_from_env_reads_every_variable():
    environ = {
        "REDUCTION_LAYER_IDX": "3",
        "VISION_EXPERT_REDUCE_FACTOR": "0.5",
        "TOKEN_MERGE_STRATEGY": "routing_similarity",
        "BASE_ALPHA": "0.3",
        "MERGE_RATIO": "0.05",
        "TOKEN_MERGE_METHOD": "mean",
        "MERGE_LAYER_LOCS": "2, 5,8",
        "KEEP_TOKEN_RATIO": "0.75",
        "ROUTING_SIMILARITY_WINDOW_SIZE": "4",
    }
    expected = FastMMoEConfig(
        vision_top_k=3,
        reduction_layer=3,
        prune_layers=(2, 5, 8),
        retention=0.75,
        merge_ratio=0.05,
        window=4,
        alpha=0.3,
        strategy="routing_similarity",
        merge_method="mean",
    )
    assert FastMMoEConfig.from_env(environ, num_experts_per_tok=6) == expected
    environ["KEEP_TOKEN_RATIO"] = "0.9,0.8,0.7"
    config = FastMMoEConfig.from_env(environ, num_experts_per_tok=6)
    assert config == dataclasses.replace(expected, retention=1.0, keep_ratios=(0.9, 0.8, 0.7))


# max(1, int(K * f))
@pytest.mark.parametrize(("top_k", "factor", "expected"), [(8, "0.5", 4), (6, "0.4", 2), (4, "0.1", 1), (8, "1", 8)])
def test_from_env_reduce_factor(top_k, factor, expected):
    config = FastMMoEConfig.from_env({"VISION_EXPERT_REDUCE_FACTOR": factor}, num_experts_per_tok=top_k)
    assert config.vision_top_k == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("REDUCTION_LAYER_IDX", "two"),
        ("REDUCTION_LAYER_IDX", "-1"),
        ("VISION_EXPERT_REDUCE_FACTOR", "1.5"),
        ("VISION_EXPERT_REDUCE_FACTOR", "half"),
        ("TOKEN_MERGE_STRATEGY", "magic"),
        ("BASE_ALPHA", "nan"),
        ("MERGE_RATIO", "2"),
        ("TOKEN_MERGE_METHOD", "max"),
        ("MERGE_LAYER_LOCS", "5;8"),
        ("MERGE_LAYER_LOCS", "8,5"),
        ("MERGE_LAYER_LOCS", "5,,8"),
        ("KEEP_TOKEN_RATIO", "0"),
        ("KEEP_TOKEN_RATIO", "0.9,x"),
        ("KEEP_TOKEN_RATIO", "0.9"),  # without layers
        ("ROUTING_SIMILARITY_WINDOW_SIZE", "3.5"),
    ],
)
def test_from_env_names_the_variable(name, text):
    with pytest.raises(ValueError, match=f"environment variables? {name}='{text}'"):
        FastMMoEConfig.from_env({name: text}, num_experts_per_tok=8)


def test_from_env_needs_k_for_the_factor():
    with pytest.raises(ValueError, match="VISION_EXPERT_REDUCE_FACTOR='0.5': expected num_experts_per_tok"):
        FastMMoEConfig.from_env({"VISION_EXPERT_REDUCE_FACTOR": "0.5"})


shares = st.floats(0.0, 1.0)
positive_shares = st.floats(0.0, 1.0, exclude_min=True)


@st.composite
def configs(draw):
    layers = tuple(sorted(draw(st.sets(st.integers(0, 60), max_size=4))))
    values = {}
    if layers and draw(st.booleans()):
        values["keep_ratios"] = draw(st.tuples(*[positive_shares] * len(layers)))
    elif layers:
        values["retention"] = draw(positive_shares)
    return FastMMoEConfig(
        vision_top_k=draw(st.none() | st.integers(1, 16)),
        reduction_layer=draw(st.integers(0, 60)),
        prune_layers=layers,
        merge_ratio=draw(shares),
        window=draw(st.integers(1, 9)),
        alpha=draw(shares),
        strategy=draw(st.sampled_from(["hybrid", "routing_similarity", "dynamic_attention"])),
        merge_method=draw(st.sampled_from(["mlerp", "mean"])),
        backend=draw(st.sampled_from(["auto", "triton", "torch"])),
        **values,
    )


@settings(deadline=None)
@given(configs())
def test_json_round_trip(config):
    values = config.to_dict()
    assert set(values) == {field.name for field in dataclasses.fields(config)}
    assert json.loads(json.dumps(values)) == values
    assert FastMMoEConfig.from_dict(json.loads(json.dumps(values))) == config


def test_from_dict():
    assert FastMMoEConfig.from_dict({}) == FastMMoEConfig()
    with pytest.raises(ValueError, match=r"unknown fields \['retain'\]"):
        FastMMoEConfig.from_dict({"retain": 0.5})
    with pytest.raises(ValueError, match="^alpha: "):
        FastMMoEConfig.from_dict({"alpha": 2})
