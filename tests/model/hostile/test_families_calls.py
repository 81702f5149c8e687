"""Every family on other prompts and batches, under other methods, and with what people put on a model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.methods import FastVConfig
from fastmmoe_kernels import VisionLayout

from .. import calls, naive_loop, tiny_families
from ..families import LOOPS
from ..naive import Settings
from ..test_parity_families import extended
from .families import (
    FAMILIES,
    ONE,
    PRUNING,
    TWO,
    batch_of,
    built,
    config_of,
    generate,
    loop_of,
    placed,
    prompt,
    tolerance,
    vision_of,
)

pytestmark = pytest.mark.usefixtures("no_gradients")
PROMPTS = {
    "image-first": (((), (5, 6, 7)), {}),
    "adjacent-images": (((5,), (), (), (8, 9)), {}),
    "five-images": (((5,), (3,), (4, 4), (8, 9), (7,), (6,)), dict(strategy="routing_similarity", merge_method="mean")),
    "one-word-behind": (((5, 6), (9,)), dict(window=4, alpha=0.2)),
}


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("name", PRUNING)
def test_other_prompts_equal_the_oracle(name, case):
    model, (texts, changes) = built(name)[0], PROMPTS[case]
    config, inputs = config_of(name, **changes), prompt(name, texts, seed=3)
    with fastmmoe.enabled(model, config):
        got = model(**placed(name, inputs)).logits[0]
    want = loop_of(name, model, config, inputs)
    torch.testing.assert_close(got[want.kept[0]], want.logits[0], rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if LOOPS[name].batch])
def test_a_batch_with_a_sample_of_text_alone(name, side):
    model, _ = built(name)
    alone = [prompt(name, ONE), prompt(name, ((5, 6, 31, 4, 4),)), prompt(name, TWO)]
    with fastmmoe.enabled(model, config_of(name)):
        batch = model(**placed(name, batch_of(alone, side))).logits
        for row, sample in enumerate(alone):
            want = model(**placed(name, sample)).logits[0]
            got = batch[row, -len(want) :] if side == "left" else batch[row, : len(want)]
            torch.testing.assert_close(got, want, rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", PRUNING)
def test_fastv_equals_a_loop_that_prunes_behind_a_layer(name, monkeypatch):
    """Behind a layer: all that comes after it, masks, positions and features added to vision tokens, is shorter."""

    def behind(loop, layer, number, hidden, arguments, flags, tokens):
        seen: dict[str, Tensor] = {}
        handle = layer.self_attn.register_forward_hook(lambda module, args, output: seen.update(row=output[1]))
        gate = naive_loop._gate(layer, loop.parts)
        with naive_loop._fewer_experts(gate, loop.parts, loop.settings, number, flags):
            output = layer(hidden, **arguments)
        handle.remove()
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        importance = seen["row"][0, :, -1].mean(0)[-len(tokens) :].tolist()
        vision = [i for i, is_vision in enumerate(flags) if is_vision]
        best = sorted(vision, key=lambda i: (-importance[i], i))[: round(0.4 * len(vision))]
        left = [i for i, is_vision in enumerate(flags) if not is_vision or i in best]
        return hidden[:, left], rest, [tokens[i] for i in left]

    model, loop, inputs = built(name)[0], LOOPS[name], prompt(name, TWO)
    layer, experts = loop.prune_layers[0], dict(vision_top_k=2, reduction_layer=1) if loop.experts else {}
    config = FastVConfig(layer=layer + 1, retention=0.4, **experts)
    n = inputs["input_ids"].shape[1]
    with fastmmoe.enabled(model, config):
        output = generate(model, inputs, 3)
    settings = Settings(
        vision_top_k=config.vision_top_k, reduction_layer=1, prune_layers=(layer,), stage_keep_ratios=(0.4,),
        merge_ratio=0.0, window=3, alpha=0.5, strategy="hybrid", merge_method="mean",
    )  # fmt: skip
    monkeypatch.setattr(naive_loop, "_pruned", behind)
    whole = extended(inputs, output.sequences[:, n:])
    want = naive_loop.run(model, loop.parts, settings, whole, vision_of(name, whole), [n, 1, 1])
    for got, expected in zip(output.logits, want.logits, strict=True):
        torch.testing.assert_close(got[0], expected[-1], rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_omni_moe_thinker"])
@pytest.mark.parametrize("layers", [(0, 1, 2), (1,), (2, 3)])
def test_pruning_around_the_layers_that_add_features(name, layers):
    config = config_of(name, prune_layers=layers, keep_ratios=(0.8,) * len(layers))
    model, inputs = built(name)[0], prompt(name, TWO)
    with fastmmoe.enabled(model, config):
        got = model(**inputs).logits[0]
    want = loop_of(name, model, config, inputs)
    torch.testing.assert_close(got[want.kept[0]], want.logits[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in PRUNING if name != "qwen3_omni_moe_thinker"])  # refused there
def test_hidden_states_where_all_tokens_are_kept(name):
    model, inputs = built(name)
    want = model(**inputs, output_hidden_states=True).hidden_states
    with fastmmoe.enabled(model, FastMMoEConfig(prune_layers=LOOPS[name].prune_layers, retention=1.0)):
        got = model(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_omni_moe_thinker", "minimax_m3_vl", "kimi_k25", "dots3_note"])
def test_an_image_and_a_video(name):
    model, config, inputs = built(name)[0], config_of(name), prompt(name, ((5, 6), (7, 8), (9, 10, 11)), seed=3)
    ids, patches, grids = inputs["input_ids"].clone(), inputs.pop("pixel_values"), inputs.pop("image_grid_thw")
    ids[0, (ids == tiny_families.IMAGE).nonzero()[16:, 1]] = tiny_families.VIDEO
    inputs |= {"input_ids": ids, "image_grid_thw": grids[:1], "video_grid_thw": grids[1:]}
    inputs |= {"pixel_values": patches[: len(patches) // 2], "pixel_values_videos": patches[len(patches) // 2 :]}
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"] + (ids == tiny_families.VIDEO).int()
    if name == "qwen3_omni_moe_thinker":
        inputs["video_second_per_grid"] = torch.tensor([1.0])
    with fastmmoe.enabled(model, config):
        got = model(**inputs).logits[0]
    want = loop_of(name, model, config, inputs)
    torch.testing.assert_close(got[want.kept[0]], want.logits[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["internvl_gpt_oss", "step3p7", "dots3_note", "muse_spark", "llama4"])
def test_one_4d_mask_for_layers_with_windows_is_refused(name):
    """In front of a prune layer it took the windows away, as the stock model does; behind it they were back."""
    model, inputs = built(name)[0], prompt(name, TWO)
    n = inputs["input_ids"].shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    config = config_of(name)
    with (
        fastmmoe.enabled(model, config),
        pytest.raises(ValueError, match="attention_mask: expected 2D where tokens are pruned and layers are of"),
    ):
        model(**inputs | {"attention_mask": causal})
    if LOOPS[name].experts:
        with fastmmoe.enabled(model, FastMMoEConfig(vision_top_k=2)):
            model(**inputs | {"attention_mask": causal})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_is_stock(name):
    """ERNIE's MoE carries a hook and a patch: a copy took the hook along, and could not be made."""
    model, inputs = tiny_families.FAMILIES[name]()
    want = model(**inputs).logits
    with fastmmoe.enabled(model, config_of(name)), pytest.warns(UserWarning, match="stock model"):
        twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, want)
    for module in twin.modules():
        assert not {"forward", "__reduce_ex__"} & set(vars(module))


def test_a_pickle_of_ernie_is_stock():
    model, inputs = tiny_families.FAMILIES["ernie4_5_vl_moe"]()
    want, file = model(**inputs).logits, io.BytesIO()
    with fastmmoe.enabled(model, config_of("ernie4_5_vl_moe")), pytest.warns(UserWarning, match="stock model"):
        torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(**inputs).logits, want)


@pytest.mark.parametrize("name", ["ernie4_5_vl_moe", "qwen3_vl_moe", "internvl_gpt_oss", "kimi_k25"])
@pytest.mark.parametrize("first", ["enabled", "offloaded"])
def test_offloading(name, first):
    """The correction bias of ERNIE's gate is in a module of its own, which is loaded by itself."""
    accelerate = pytest.importorskip("accelerate")
    model, _ = tiny_families.FAMILIES[name]()
    inputs, config = prompt(name, TWO), config_of(name)
    stock = model(**inputs).logits
    with fastmmoe.enabled(model, config):
        want = model(**inputs).logits
    if first == "enabled":
        fastmmoe.enable(model, config)
    accelerate.cpu_offload(model, execution_device="cpu")
    if first == "offloaded":
        fastmmoe.enable(model, config)
    torch.testing.assert_close(model(**inputs).logits, want, rtol=0, atol=1e-4)
    fastmmoe.disable(model)
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("name", ["qwen3_5_moe", "ernie4_5_vl_moe", "aria", "nemotron_h_omni"])
@pytest.mark.parametrize("where", ["gate", "experts"])
def test_adapters_on_gates_and_experts(name, where):
    peft = pytest.importorskip("peft")
    model, _ = tiny_families.FAMILIES[name]()
    inputs, text = prompt(name, TWO), LOOPS[name].parts.text
    ends = (
        ("gate.weight", "router.weight") if where == "gate" else ("gate_up_proj", "up_proj", "down_proj", "fc1", "fc2")
    )  # noqa: E501
    dims = 2 if where == "gate" else 3
    of_text = [(key, value) for key, value in model.named_parameters() if key.startswith(text)]
    names = [key for key, value in of_text if key.endswith(ends) and value.dim() == dims]
    options = dict(target_modules=[], target_parameters=names, r=2, lora_alpha=8, init_lora_weights=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    with fastmmoe.enabled(adapted, config_of(name)), fastmmoe.enabled(merged, config_of(name)):
        got, want = (one(**inputs).logits[:, -3:] for one in (adapted, merged))
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance(name))


class _Wrapper(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.inside = model


@pytest.mark.parametrize("name", FAMILIES)
def test_enabled_from_a_module_above_or_inside(name):
    model, inputs = built(name)
    stock = model(**inputs).logits
    with fastmmoe.enabled(model, config_of(name)):
        want = model(**inputs).logits
    for module in (_Wrapper(model), getattr(model, "model", model)):
        fastmmoe.enable(module, config_of(name))
        got = model(**inputs).logits
        fastmmoe.disable(model)
        assert torch.equal(got, want)
    assert torch.equal(model(**inputs).logits, stock)


def test_a_fixed_layout_of_models_with_recurrent_and_sliding_layers():
    for name in ("qwen3_5_moe", "internvl_gpt_oss", "lfm2_vl_lfm2_moe", "qwen3_vl_moe"):
        model, _ = built(name)
        batch = batch_of([prompt(name, ONE), prompt(name, TWO)])
        layout = VisionLayout.from_mask(
            torch.isin(batch["input_ids"], torch.tensor(LOOPS[name].placeholders)), batch["attention_mask"]
        )
        with fastmmoe.enabled(model, config_of(name)):
            want = model(**batch).logits
            with fastmmoe.fixed_layout(model, layout):
                assert torch.equal(model(**batch).logits, want)


@pytest.mark.parametrize("name", ["nemotron_h_omni"])
@torch.no_grad()
def test_disabled_within_a_block_every_bit_is_stock(name):
    """Its head knows no `logits_to_keep` and would hand on what it is lent: last logits alone have other bits."""
    use = calls.uses_of(name)["greedy"]
    want, model = calls.answer(calls.fresh(name), name, use.run), calls.fresh(name)
    with fastmmoe.enabled(model, FastMMoEConfig()):
        fastmmoe.disable(model)
        assert calls.differences(calls.answer(model, name, use.run), want) is None
