"""Times by calculation: by hand, against FLOPs and what a stock layer moves, orders that must hold, bad input."""

import collections
import itertools
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel

import fastmmoe
from fastmmoe import FastMMoEConfig, FastVConfig, TimeReport, flops, prefill_time
from fastmmoe.cost import devices
from fastmmoe.cost.devices import DEVICES, Ceilings, card, ceilings_of
from fastmmoe.cost.ops import expected_experts
from fastmmoe.cost.sweep import BATCHES, VISION
from fastmmoe.families import ARCHITECTURES, Architecture, architecture_of, expert_obstacle, find_text_model
from fastmmoe.families.architecture import Layer, Mixer, Mlp

from . import tiny_families
from .test_cli import refused, succeed
from .tiny import tiny_batch, tiny_internvl

INTERNVL = "internvl3.5-30b-a3b"
HALF_EXPERTS = FastMMoEConfig(vision_top_k=4, reduction_layer=2)
OFFICIAL_HALF = FastMMoEConfig(vision_top_k=4, reduction_layer=2, prune_layers=(5, 8, 12), retention=0.5)
OPTIONS = ["--vision-top-k", 4, "--prune-layers", "5,8,12", "--retention", 0.5]
README = Path(__file__).parents[2] / "README.md"

# a device on which nothing but FLOPs, bytes or launches takes time
ONLY = {
    "flops": Ceilings("flops", 1e12, 1e30, 0.0, "bfloat16", "hand"),
    "bytes": Ceilings("bytes", 1e30, 1e12, 0.0, "bfloat16", "hand"),
    "launches": Ceilings("launches", 1e30, 1e30, 1e-5, "bfloat16", "hand"),
}
# of a stock layer in 16 bits: four projections, attention, gate, experts, four norms, two rotations, two sums
LAUNCHES = 4 + 1 + 5 + 16 + 4 * 8 + 2 * 5 + 2


def ops_of(ops) -> dict:
    return {op.name: op for op in ops}


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_one_image_on_h100_reads_all_experts_whatever_they_are():
    """1.2 GB of weights: 403 us, and what goes in, out and between the kernels; the FLOPs need 180 us or 98 us."""
    weights = 128 * 3 * 2048 * 768 * 2
    report = prefill_time(INTERNVL, 100, 1792, HALF_EXPERTS, "h100")
    for layer, pairs in ((0, 1892 * 8), (2, 100 * 8 + 1792 * 4)):
        op = ops_of(report.per_layer[layer].reduced_ops)["experts"]
        moved = weights + 2 * (2 * 1892 * 2048 + 2 * pairs * (768 + 2048))
        assert (op.bytes, op.binds) == (pytest.approx(moved), "bytes")
        assert op.seconds == pytest.approx(moved / 3.0e12) and op.seconds > 403e-6
        assert op.weight_bytes == pytest.approx(weights)
        assert op.flops == 6 * 2048 * 768 * pairs and op.flops / 794e12 < op.seconds / 2
    # half of the experts' FLOPs: 9 % of their time
    layer = report.per_layer[2]
    assert ops_of(layer.reduced_ops)["experts"].seconds > 0.9 * ops_of(layer.dense_ops)["experts"].seconds
    assert report.speedup == pytest.approx(report.dense / report.reduced) and 1 < report.speedup < 1.05


def test_many_tokens_are_bound_by_flops():
    report = prefill_time(INTERNVL, [100] * 16, [1792] * 16, HALF_EXPERTS, "h100")
    op = ops_of(report.per_layer[0].dense_ops)["experts"]
    assert op.binds == "flops" and op.seconds == pytest.approx(6 * 2048 * 768 * 8 * 1892 * 16 / 794e12)
    # attention is each sample's own: a causal half
    attention = ops_of(report.per_layer[0].dense_ops)["attention"]
    assert attention.binds == "flops" and attention.seconds == pytest.approx(16 * 1892**2 * 2 * 32 * 128 / 794e12)
    projections = ops_of(report.per_layer[0].dense_ops)["projections"]
    assert projections.seconds == pytest.approx(2 * 16 * 1892 * 2048 * (2 * 4096 + 2 * 512) / 794e12)


def test_few_tokens_are_bound_by_launches():
    report = prefill_time(INTERNVL, 10, 20, OFFICIAL_HALF, replace(DEVICES["h100"], launch=1e-3))
    assert report.dense == pytest.approx(48 * LAUNCHES * 1e-3)
    # three prune stages of 16
    assert report.reduced == pytest.approx((48 * LAUNCHES + 3 * 16) * 1e-3)
    assert {op.binds for layer in report.per_layer for op in layer.reduced_ops} == {"launches"}
    assert [layer.layer for layer in report.per_layer if "prune" in ops_of(layer.reduced_ops)] == [5, 8, 12]


def by_hand(**sizes) -> Architecture:
    layer = Layer(
        Mixer(weights=5000, pair=70, query=30, key=10, value=20, normed=40, norms=2, turned=30),
        Mlp(weights=100 * 4 + 600, expert=900, width=7, expert_width=3, expert_hidden=50),
    )
    return Architecture(**(dict(hidden_size=100, num_experts=4, num_experts_per_tok=2, layers=(layer,)) | sizes))


def test_a_small_layer_by_hand():
    """Two samples of 3 + 5 and 1 + 2 tokens, of which 2 and 1 vision tokens are left behind the stage, 2 bytes each."""
    config = FastMMoEConfig(vision_top_k=1, reduction_layer=0, prune_layers=(0,), retention=0.5)
    report = prefill_time(by_hand(), (3, 1), (5, 2), config, ONLY["bytes"], vision_left=[(2, 1)])
    ops = ops_of(report.per_layer[0].reduced_ops)
    # 11 tokens in attention, 7 behind it
    assert ops["elementwise"].bytes == 11 * (100 * (36 + 6) + 40 * 36 + 30 * 20) + 7 * 100 * (36 + 6)
    # hidden states in and out, queries 30, keys 10, values 20, attention's output 40
    assert ops["projections"].bytes == 2 * (5000 + 11 * (200 + 60 + 40)) and ops["projections"].weight_bytes == 10000
    assert ops["attention"].bytes == 2 * 11 * (60 + 40)
    assert ops["prune"].bytes == 2 * (11 * (10 + 100) + 7 * 2 * 100)
    # logits of 4 experts: 2 written, 2 read, 4 written, 4 read, 4 written, 4 read
    assert ops["gate"].bytes == 2 * 400 + 7 * (2 * 100 + 4 * 20)
    # an expert is missed by a text token in one of 2 cases, by a vision token in 3 of 4; 4 * 2 + 3 * 1 pairs
    touched = 4 * (1 - 0.5**4 * 0.75**3)
    assert ops["experts"].bytes == pytest.approx(2 * (touched * 900 + 2 * 7 * 50 + 2 * 11 * (3 + 50)))
    assert ops["mlp"].bytes == 2 * (600 + 7 * 2 * (100 + 7))
    assert report.reduced == pytest.approx(sum(op.bytes for op in ops.values()) / 1e12)
    assert {op.binds for op in ops.values()} == {"bytes"} and report.per_layer[0].moe_tokens == 7
    flops_only = prefill_time(by_hand(), (3, 1), (5, 2), config, ONLY["flops"], vision_left=[(2, 1)])
    assert ops_of(flops_only.per_layer[0].reduced_ops)["experts"].seconds == 2 * 900 * 11 / 1e12
    float32 = prefill_time(by_hand(), 8, 3, FastMMoEConfig(), replace(ONLY["bytes"], dtype="float32"))
    # without casts: 28 bytes of a norm, 40 of a rotation, 12 of a sum
    assert ops_of(float32.per_layer[0].dense_ops)["elementwise"].bytes == 11 * (200 * (28 + 12) + 40 * 28 + 30 * 40)


def test_vision_tokens_with_experts_of_their_own_read_them_too():
    text = by_hand().layers[0]
    layer = replace(text, vision_mlp=replace(text.mlp, expert=300, expert_width=1))
    both = prefill_time(by_hand(layers=(layer,)), 3, 5, FastMMoEConfig(), ONLY["bytes"])
    op = ops_of(both.per_layer[0].dense_ops)["experts"]
    weights = 4 * (1 - 0.5**3) * 900 + 4 * (1 - 0.5**5) * 300
    assert op.weight_bytes == pytest.approx(2 * weights)
    assert op.bytes == pytest.approx(2 * (weights + 2 * 8 * 50 + 2 * (6 * 53 + 10 * 51)))


def test_expected_experts_by_all_routings():
    """Two text tokens with 2 of 4 experts and a vision token with 1: every combination once."""
    pairs, singles = list(itertools.combinations(range(4), 2)), [(one,) for one in range(4)]
    counts = [len({*a, *b, *c}) for a, b, c in itertools.product(pairs, pairs, singles)]
    assert expected_experts(4, [(2, 4), (1, 1)]) == pytest.approx(sum(counts) / len(counts))
    assert expected_experts(4, [(0, 0)]) == 0 and expected_experts(4, [(1, 4)]) == 4


# --- what a stock layer does ------------------------------------------------------------------------------------------

VIEWS = "view _unsafe_view t transpose expand unsqueeze slice split detach alias reshape empty empty_like".split()


class Counter(TorchDispatchMode):
    """Operations and bytes by the innermost module that runs."""

    def __init__(self, model):
        super().__init__()
        self.inside, self.found = [], collections.defaultdict(list)
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self.inside.append(name))
            module.register_forward_hook(lambda *_: self.inside.pop() and None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if name not in VIEWS and self.inside:
            tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, torch.Tensor)]
            moved = sum(one.numel() * one.element_size() for one in tensors)
            self.found[self.inside[-1]].append((name, moved))
        return out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_elementwise_ops_are_what_a_stock_layer_moves(dtype):
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=256, num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=4,
        head_dim=128, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
    )  # fmt: skip
    n = 200
    model = Qwen3MoeModel._from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.set_experts_implementation("grouped_mm")
    hidden, turn = (torch.randn(1, n, width, dtype=getattr(torch, dtype)) for width in (256, 128))
    with torch.no_grad(), Counter(model) as counter:
        model.layers[0](hidden, position_embeddings=(turn, turn), attention_mask=None)
    elementwise = [
        one
        for name, found in counter.found.items()
        for position, one in enumerate(found)
        # of attention the rotary embedding, which comes first
        if name.endswith("norm") or name == "layers.0" or (name.endswith("self_attn") and position < 10)
    ]
    device = replace(DEVICES["h100"], dtype=dtype)
    op = ops_of(prefill_time(config, n, 0, FastMMoEConfig(), device).per_layer[0].dense_ops)["elementwise"]
    assert op.launches == len(elementwise)
    # but for a few numbers per token: means, roots, and the cosines that all heads share
    assert op.bytes == pytest.approx(sum(moved for _, moved in elementwise), rel=0.015)


def test_elementwise_bytes_of_the_30b_model():
    op = ops_of(prefill_time(INTERNVL, 1000, 0, FastMMoEConfig()).per_layer[0].dense_ops)["elementwise"]
    assert (op.bytes, op.launches) == (430_080_000, 44)


def test_elementwise_ops_of_mla():
    """Of DeepSeek-VL2-Small: 512 latents are normed, 64 numbers of each of 16 queries and of one key are turned."""
    op = ops_of(prefill_time("deepseek-vl2-small", 1000, 0, FastMMoEConfig()).per_layer[0].dense_ops)["elementwise"]
    assert (op.bytes, op.launches) == (1000 * (2 * 2048 * (36 + 6) + 512 * 36 + 17 * 64 * 20), 3 * 8 + 2 * 5 + 2)


@pytest.mark.parametrize("name", [name for name in tiny_families.FAMILIES if name not in tiny_families.ABSENT])
def test_norms_of_queries_and_keys_are_those_of_the_model(name):
    text = find_text_model(tiny_families.FAMILIES[name]()[0])[1]
    for layer, module in zip(architecture_of(text.config).layers, text.layers, strict=True):
        attention = getattr(module, "self_attn", None)
        if attention is None or not layer.mixer.pair:
            continue
        names = ("q_a_layernorm", "kv_a_layernorm", "q_norm", "q_layernorm", "qk_norm")
        norms = {name: norm for name in names if (norm := getattr(attention, name, None)) is not None}
        if getattr(text.config, "kv_lora_rank", None):
            assert layer.mixer.normed == sum(norm.weight.numel() for norm in norms.values())
            assert layer.mixer.norms == len(norms)
        else:
            assert layer.mixer.norms == (2 if norms else 0)


# --- orders -----------------------------------------------------------------------------------------------------------

SIZES = st.integers(1, 200)
WIDTHS = dict(width=SIZES, expert_width=SIZES, expert_hidden=SIZES)
LAYERS = st.builds(
    Layer,
    st.one_of(
        st.just(Mixer()),
        st.builds(Mixer, weights=SIZES, pair=st.integers(60, 90), query=st.integers(1, 30), key=SIZES, value=SIZES),
        st.builds(Mixer, weights=SIZES, state=SIZES, query=SIZES, key=SIZES, value=SIZES),
        st.builds(Mixer, weights=SIZES, pair=st.integers(60, 90), query=SIZES.filter(lambda n: n < 60), window=SIZES),
    ),
    st.one_of(
        st.builds(Mlp, weights=SIZES, width=SIZES),
        st.builds(Mlp, weights=st.integers(160, 400), expert=SIZES, **WIDTHS),
    ),
)
STACKS = st.lists(LAYERS, min_size=2, max_size=4).map(tuple)
MODELS = st.one_of(
    st.sampled_from(list(ARCHITECTURES.values())),
    st.builds(Architecture, st.just(20), st.just(8), st.integers(2, 4), STACKS),
)
COUNTS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2000)), min_size=1, max_size=3)
ON = st.sampled_from([*DEVICES.values(), *ONLY.values(), Ceilings("slow", 1e6, 1e6, 1e-6, "float32", "hand")])


@settings(deadline=None, max_examples=60)
@given(MODELS, COUNTS, ON, st.data())
def test_parts_add_up(model, counts, device, data):
    top_k = data.draw(st.one_of(st.none(), st.integers(1, model.num_experts_per_tok)))
    prune = data.draw(st.integers(1, model.num_hidden_layers - 1))
    config = data.draw(
        st.sampled_from(
            [
                FastMMoEConfig(vision_top_k=top_k, reduction_layer=1, prune_layers=(prune,), retention=0.4),
                FastVConfig(layer=prune, retention=0.4, vision_top_k=top_k, reduction_layer=1),
            ]
        )
    )
    text, vision = zip(*counts, strict=True)
    report, counted = prefill_time(model, text, vision, config, device), flops(model, text, vision, config)
    assert report.dense == pytest.approx(sum(layer.dense for layer in report.per_layer))
    assert report.reduced == pytest.approx(sum(layer.reduced for layer in report.per_layer))
    for layer, same in zip(report.per_layer, counted.per_layer, strict=True):
        assert (layer.attention_tokens, layer.moe_tokens) == (same.attention_tokens, same.moe_tokens)
        for seconds, ops, total in (
            (layer.dense, layer.dense_ops, same.dense),
            (layer.reduced, layer.reduced_ops, same.reduced),
        ):
            assert seconds == pytest.approx(sum(op.seconds for op in ops))
            # the FLOPs of `fastmmoe.flops`, which PyTorch's counter agrees with
            assert sum(op.flops for op in ops) == pytest.approx(total)
            floor = sum(max(op.flops / device.flops, op.bytes / device.bytes) for op in ops)
            assert seconds == pytest.approx(max(floor, device.launch * sum(op.launches for op in ops)))
            assert all(op.seconds > 0 or not op.flops + op.bytes for op in ops) and all(op.flops >= 0 for op in ops)
            assert len({op.binds == "launches" for op in ops}) == 1


@settings(deadline=None, max_examples=60)
@given(MODELS, COUNTS, ON, st.integers(0, 500), st.integers(0, 500))
def test_more_tokens_are_never_faster(model, counts, device, more_text, more_vision):
    text, vision = (list(one) for one in zip(*counts, strict=True))
    config = FastMMoEConfig(vision_top_k=1, reduction_layer=1)
    before = prefill_time(model, text, vision, config, device)
    text[0], vision[-1] = text[0] + more_text, vision[-1] + more_vision
    after = prefill_time(model, text, vision, config, device)
    slack = 1 + 1e-9
    assert before.dense <= after.dense * slack and before.reduced <= after.reduced * slack
    # a sample more, too
    assert after.dense <= prefill_time(model, [*text, 5], [*vision, 5], config, device).dense * slack
    # and fewer experts of the same tokens are never slower
    assert after.reduced <= after.dense * slack


def test_what_was_found_of_one_image_and_of_many():
    """Pruning hardly helps the experts of one image; saved FLOPs are saved time at 8,000 tokens, or eight images."""
    one = prefill_time(INTERNVL, 100, 1792, OFFICIAL_HALF)
    long, many = (
        prefill_time(INTERNVL, 100, 8000, OFFICIAL_HALF),
        prefill_time(INTERNVL, [100] * 8, [1792] * 8, OFFICIAL_HALF),
    )
    last = one.per_layer[-1]
    assert ops_of(last.reduced_ops)["experts"].seconds > 0.85 * ops_of(last.dense_ops)["experts"].seconds
    assert one.speedup < 1.35 < 1.7 < long.speedup and many.speedup > 1.8
    assert prefill_time(INTERNVL, 100, 256, OFFICIAL_HALF).speedup < 1.01


@pytest.mark.parametrize("device", DEVICES)
def test_every_architecture_on_every_device(device):
    for name, model in ARCHITECTURES.items():
        # of one expert per token there are no fewer
        top_k = None if expert_obstacle(name) else 1
        report = prefill_time(name, 100, 1792, FastMMoEConfig(vision_top_k=top_k, reduction_layer=1), device)
        assert isinstance(report, TimeReport) and len(report.per_layer) == model.num_hidden_layers
        assert 0 < report.reduced <= report.dense < 60 and report.ceilings == DEVICES[device]
        names = {op.name for layer in report.per_layer for op in layer.dense_ops}
        assert {"projections", "attention", "elementwise", "gate", "experts"} <= names
        for layer in model.layers:
            # widths are there wherever weights are
            assert (layer.mixer.query > 0 and layer.mixer.output > 0) == (layer.mixer.weights > 0)
            assert bool(layer.mlp.expert) == bool(layer.mlp.expert_width) == bool(layer.mlp.expert_hidden)


# --- devices ----------------------------------------------------------------------------------------------------------


def test_a_file_of_measured_ceilings(tmp_path):
    measured = Ceilings("mine", 500e12, 2e12, 5e-6, "bfloat16", "measured by hand")
    plain, result = tmp_path / "plain.json", tmp_path / "result.json"
    plain.write_text(json.dumps(asdict(measured)))
    result.write_text(json.dumps({"what": "prefill", "ceilings": asdict(measured)}))
    expected = prefill_time(INTERNVL, 100, 1792, OFFICIAL_HALF, measured)
    assert expected.dense > prefill_time(INTERNVL, 100, 1792, OFFICIAL_HALF, "h100").dense
    for path in (plain, str(plain), result):
        assert prefill_time(INTERNVL, 100, 1792, OFFICIAL_HALF, path) == expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("no json", "is not JSON"),
        ("[1]", "expected the fields name, flops, bytes, launch, dtype, source, got list"),
        ({"name": "x"}, "expected the fields name, flops"),
        ({"flops": 0}, "flops: expected a number >= 1, got 0"),
        ({"bytes": 1e-320}, "bytes: expected a number >= 1, got 1e-320"),
        ({"bytes": "fast"}, "bytes: expected a number >= 1, got 'fast'"),
        ({"launch": -1.0}, "launch: expected a number >= 0, got -1.0"),
        ({"dtype": "bf16"}, "dtype: expected one of torch's such as bfloat16, got 'bf16'"),
        ({"source": 5}, "source: expected words, got 5"),
    ],
)
def test_a_file_that_holds_no_ceilings(tmp_path, content, says):
    path = tmp_path / "c.json"
    if isinstance(content, dict) and "name" not in content:
        content = asdict(DEVICES["h100"]) | content
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=re.escape("device: ") + ".*" + re.escape(says)):
        prefill_time(INTERNVL, 1, 1, FastMMoEConfig(), path)


def test_bad_devices(tmp_path):
    known = "device: expected one of h100, h200, a100, l40s, mi300x, cpu or a .json file of ceilings, got 'b200'"
    with pytest.raises(ValueError, match=known):
        prefill_time(INTERNVL, 1, 1, FastMMoEConfig(), "b200")
    with pytest.raises(TypeError, match="device: expected a name or a .json file, got 5"):
        prefill_time(INTERNVL, 1, 1, FastMMoEConfig(), 5)
    with pytest.raises(OSError):
        prefill_time(INTERNVL, 1, 1, FastMMoEConfig(), tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((INTERNVL, -1, 5, FastMMoEConfig()), ValueError, "n_text: expected token counts >= 0, got -1"),
        ((INTERNVL, (5, 5), (5,), FastMMoEConfig()), ValueError, "n_vision: expected 2 samples"),
        ((INTERNVL, 0, 0, FastMMoEConfig()), ValueError, "at least one token"),
        ((INTERNVL, 1, 1, {}), TypeError, "config: expected a FastMMoEConfig"),
        ((INTERNVL, 1, 1, FastMMoEConfig(vision_top_k=9)), ValueError, "vision_top_k"),
        ((INTERNVL, 1, 1, FastMMoEConfig(expert_budget=128)), ValueError, "fewer than the model's 128 experts"),
        ((INTERNVL, 1, 1, FastMMoEConfig(expert_budget=10**5)), ValueError, "fewer than the model's 128 experts"),
        (("gpt-2", 1, 1, FastMMoEConfig()), ValueError, "text_config: unknown name 'gpt-2'"),
    ],
)
def test_refusals_are_those_of_flops(arguments, error, says):
    for calculate in (flops, prefill_time):
        with pytest.raises(error, match=says):
            calculate(*arguments)


def test_a_cpu_is_measured_once(monkeypatch):
    devices._measure_cpu.cache_clear()
    found = ceilings_of("cpu")
    assert found.dtype == "float32" and found.itemsize == 4 and 1e9 < found.flops < 1e14 and 1e8 < found.bytes < 1e13
    assert 1e-8 < found.launch < 1e-3 and "measured here" in found.source
    assert ceilings_of("cpu") is found
    report = prefill_time(INTERNVL, 10, 10, FastMMoEConfig(), "cpu")
    assert report.ceilings is found


def test_cards():
    assert card("NVIDIA H100 80GB HBM3") == "h100" and card("AMD Instinct MI300X VF") == "mi300x"
    # other memory and clocks than those in the table
    assert card("NVIDIA H100 PCIe") is card("NVIDIA GeForce RTX 4090") is card("NVIDIA A100-SXM4-40GB") is None
    assert set(devices._CARDS.values()) == set(DEVICES)


# --- report -----------------------------------------------------------------------------------------------------------


def enabled_report(dtype=torch.float32):
    model = tiny_internvl().to(dtype)
    batch = tiny_batch(model)
    with torch.no_grad(), fastmmoe.enabled(model, FastMMoEConfig(vision_top_k=2, prune_layers=(1, 3), retention=0.5)):
        model(**batch)
        return model, fastmmoe.report(model)


def test_a_report_takes_what_was_measured():
    model, report = enabled_report()
    left = [[a + b for a, b in zip(stage.kept, stage.merged, strict=True)] for stage in report.stages]
    config = FastMMoEConfig(vision_top_k=2, prune_layers=(1, 3), retention=0.5)
    expected = prefill_time(model, report.n_text, report.n_vision, config, "a100", vision_left=left)
    assert report.time("a100") == expected and len(report.n_text) > 1
    assert [layer.moe_tokens for layer in expected.per_layer] == [sum(tokens) for tokens in report.tokens_per_layer]
    # methods whose counts depend on the data: those of the stages count, whatever the config would say
    last = replace(report.stages[-1], kept=(1, 2), merged=(1, 0))
    fewer = replace(report, stages=(*report.stages[:-1], last)).time("a100")
    assert fewer.per_layer[-1].moe_tokens == sum(report.n_text) + 4 < expected.per_layer[-1].moe_tokens
    assert report.device == "cpu" and report.time().ceilings is ceilings_of("cpu")
    # a CPU would have to be measured first
    assert "by calculation" not in str(report) and "architecture" not in repr(report)
    line = next(line for line in str(replace(report, device="h200")).splitlines() if "by calculation" in line)
    there = report.time("h200")
    assert f"{there.dense * 1e3:.1f} ms dense, {there.reduced * 1e3:.1f} now, x{there.speedup:.2f}" in line


def test_a_report_of_a_device_without_ceilings():
    _, report = enabled_report(torch.bfloat16)
    assert report.device is None and report.time("h100").dense > 0
    with pytest.raises(ValueError, match="device: that of the model has no known ceilings, expected one of h100, "):
        report.time()


# --- command line and README ------------------------------------------------------------------------------------------


def time_of(*options):
    return json.loads(succeed("time", INTERNVL, *options, "--json"))


def test_the_command_says_what_the_function_says():
    figures = time_of(*OPTIONS, "--device", "h200", "--batch", 2)
    report = prefill_time(INTERNVL, [100] * 2, [1792] * 2, OFFICIAL_HALF, "h200")
    as_json = json.loads(json.dumps(asdict(report)))
    assert {name: figures[name] for name in as_json} == as_json and figures["batch"] == 2
    assert figures["config"] == OFFICIAL_HALF.to_dict()
    speedups = figures["sweep"]["speedups"]
    assert list(speedups) == [str(vision) for vision in VISION] and figures["sweep"]["batches"] == list(BATCHES)
    for batch, vision in ((1, 256), (8, 4096)):
        there = prefill_time(INTERNVL, [100] * batch, [vision] * batch, OFFICIAL_HALF, "h200").speedup
        assert speedups[str(vision)][BATCHES.index(batch)] == there


def test_the_sentence():
    """Each of its figures, by the function; the smallest batch that is near the best."""
    out = " ".join(succeed("time", INTERNVL, *OPTIONS).split())
    said = re.search(
        r"x(\S+) expected: the experts' weights bind; batch (\d+) or (\S+) vision tokens would give x(\S+)\. ", out
    )
    now, batch, vision, then = said.groups()
    batch, vision = int(batch), int(vision.replace(",", ""))

    def speedup(vision: int, batch: int) -> float:
        return prefill_time(INTERNVL, [100] * batch, [vision] * batch, OFFICIAL_HALF).speedup

    assert now == f"{speedup(1792, 1):.2f}" and then == f"{speedup(1792, batch):.2f}"
    assert speedup(vision, 1) >= speedup(1792, batch)
    best = max(speedup(1792, 2**power) for power in range(1, 6))
    wanted = speedup(1792, 1) + 0.9 * (best - speedup(1792, 1))
    assert speedup(1792, batch) >= wanted > speedup(1792, batch // 2)
    assert "not measurements" in out and "13 to 47" in out and "Ceilings: H100 SXM" in out
    many = " ".join(succeed("time", INTERNVL, *OPTIONS, "--batch", 8).split())
    assert "elementwise ops' activations bind; larger batches would give little more." in many
    few = succeed("time", INTERNVL, "--vision", 100, "--text", 10, *OPTIONS)
    assert "expected: the host's launches bind" in few


def test_the_picture_and_a_measured_file(tmp_path):
    path, picture = tmp_path / "mine.json", tmp_path / "time.png"
    path.write_text(json.dumps(asdict(replace(DEVICES["h100"], name="mine"))))
    out = succeed("time", INTERNVL, *OPTIONS, "--device", path, "--output", picture)
    assert str(picture) in " ".join(out.split()).replace(" ", "") or str(picture) in out
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width == 960
    assert time_of(*OPTIONS, "--device", path)["dense"] == prefill_time(INTERNVL, 100, 1792, OFFICIAL_HALF).dense
    assert time_of("--vision", 0)["speedup"] == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--device", "b200"], "--device b200: expected one of h100, h200, a100, l40s, mi300x, cpu or a .json file"),
        (["--device", "missing.json"], "missing.json"),
        (["--output", "picture.jpg", "--device", "cpu"], "expected a .png file"),
        (["--output", "no/such/picture.png", "--device", "cpu"], "in a directory that exists"),
        (["--prune-layers", "48", "--retention", "0.5", "--device", "cpu"], "48 layers"),
        (["--text", "0", "--vision", "0", "--device", "cpu"], "at least one token"),
    ],
)
def test_the_command_refuses_before_any_work(monkeypatch, options, says):
    def no_work(*_):
        raise AssertionError("a CPU was measured")

    monkeypatch.setattr(devices, "_measure_cpu", no_work)
    assert says in refused("time", INTERNVL, *options)


def test_names_are_not_read_as_markup(tmp_path):
    device, model = tmp_path / "mine.json", tmp_path / "m[v1][" / "b]"
    device.write_text(json.dumps(asdict(replace(DEVICES["h100"], name="[red]x[/foo]", source="[/b]"))))
    model.mkdir(parents=True)
    (model / "config.json").write_text(tiny_internvl().config.to_json_string())
    out = "".join(succeed("time", model, "--device", device).split())
    assert "[red]x[/foo]" in out and "m[v1][/b]" in out
    assert "m[v1][/b]" in "".join(succeed("flops", model).split())


def test_a_folder_is_no_picture(tmp_path):
    (tmp_path / "time.png").mkdir()
    assert "expected a .png file" in refused("time", INTERNVL, "--output", tmp_path / "time.png")


def test_more_experts_per_token_than_there_are():
    sizes = dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, moe_intermediate_size=4)
    with pytest.raises(ValueError, match="20 experts per token, expected at most its 8"):
        Architecture.of(num_experts=8, num_experts_per_tok=20, **sizes)


def test_figures_of_the_readme():
    said = " ".join(README.read_text().split())
    one, experts = (prefill_time(INTERNVL, 100, 1792, config, "h100") for config in (OFFICIAL_HALF, HALF_EXPERTS))
    eight = prefill_time(INTERNVL, [100] * 8, [1792] * 8, OFFICIAL_HALF, "h100")
    left = 1 - flops(INTERNVL, 100, 1792, OFFICIAL_HALF).saved
    weights = ops_of(one.per_layer[0].dense_ops)["experts"].weight_bytes
    assert f"{one.dense * 1e3:.1f} ms dense and {one.reduced * 1e3:.1f} ms reduced, x{one.speedup:.2f}" in said
    assert f"where the FLOPs fall to {left:.2f}: the experts" in said
    assert f"reading their weights, {weights / 1e9:.2f} GB per layer" in said
    assert f"`--vision-top-k 4` alone gives x{experts.speedup:.2f}" in said
    assert f"Eight such prompts in a batch give x{eight.speedup:.2f}" in said
