"""DeepSeek-VL2 against what the official code computes (golden data), and what the port refuses."""

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

import fastmmoe.prefill.experts  # noqa: F401  registers "fastmmoe"
from fastmmoe.models.deepseek_vl2 import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2TextConfig
from fastmmoe.models.deepseek_vl2.image_tokens import image_token_index, num_image_tokens, tokens_per_side
from fastmmoe.models.deepseek_vl2.text_model import DeepseekVLV2Router

from .golden import CASES, VARIANTS, golden, golden_case
from .tiny_deepseek import tiny_deepseek_batch, tiny_deepseek_vl2

VISION = dict(atol=1e-5, rtol=0)
LOGITS = dict(atol=1e-4, rtol=0)
STEPS = 8


@cache
def model_of(variant: str, attn_implementation: str = "sdpa", dtype=torch.float32, experts: str | None = None):
    return AutoModelForImageTextToText.from_pretrained(
        golden(variant), attn_implementation=attn_implementation, dtype=dtype, experts_implementation=experts
    ).eval()


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(params=["sdpa", "eager"])
def attention(request):
    return request.param


def generate(model, inputs, **options):
    """As many greedy tokens as the golden data have, which do not end at eos."""
    out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, pad_token_id=2, **options)
    return out[:, -STEPS:]


@torch.no_grad()
def recorded(model, inputs):
    """(output, what left the vision tower, the projector, and every gate) of one pass."""
    seen = {"vision": [], "projector": [], "gates": []}

    def recorder(name, value=lambda output: output):
        return lambda module, args, output: seen[name].append(value(output))

    handles = [
        model.model.vision_tower.register_forward_hook(recorder("vision", lambda output: output.last_hidden_state)),
        model.model.multi_modal_projector.register_forward_hook(recorder("projector")),
        *(
            layer.mlp.gate.register_forward_hook(recorder("gates"))
            for layer in model.model.language_model.layers
            if hasattr(layer.mlp, "gate")
        ),
    ]
    try:
        output = model(**inputs, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    return output, seen


# ------------------------------------------------------------------------------------------------ golden data


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_the_official_model(variant, attention, case):
    inputs, want = golden_case(variant, case)
    model = model_of(variant, attention)
    output, seen = recorded(model, inputs)
    real = inputs["attention_mask"]  # official padding attends to everything; nobody else does that

    torch.testing.assert_close(seen["vision"][0], want["vision_features"], **VISION)
    torch.testing.assert_close(seen["projector"][0], want["projector_out"], **VISION)
    torch.testing.assert_close(output.hidden_states[0], want["inputs_embeds"], **VISION)
    for layer in range(model.config.language_config.num_hidden_layers - 1):
        got = output.hidden_states[layer + 1]  # the last one has been through the final norm
        torch.testing.assert_close(got[real], want[f"layer_output.{layer}"][real], **LOGITS)
    torch.testing.assert_close(output.hidden_states[-1][real], want["final_norm_output"][real], **LOGITS)
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits[real], want["logits"][real], **LOGITS)

    for layer, (logits, weights, ids) in enumerate(seen["gates"], start=1):
        ids, order = ids.sort(-1)  # the official choice comes in no order
        assert torch.equal(ids.view(*real.shape, -1)[real].int(), want[f"router_topk_idx.{layer}"][real])
        got = weights.gather(1, order).view(*real.shape, -1)[real]
        torch.testing.assert_close(got, want[f"router_topk_weight.{layer}"][real], **LOGITS)
        if f"router_logits.{layer}" in want:
            torch.testing.assert_close(logits.view(*real.shape, -1), want[f"router_logits.{layer}"], **LOGITS)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_the_official_ones(variant, attention, case):
    inputs, want = golden_case(variant, case)
    model = model_of(variant, attention)
    assert torch.equal(generate(model, inputs), want["generated_ids"])
    assert torch.equal(generate(model, inputs, use_cache=False), want["generated_ids"])


def test_a_static_cache(variant):
    inputs, want = golden_case(variant, "single_image")
    assert torch.equal(generate(model_of(variant), inputs, cache_implementation="static"), want["generated_ids"])


def test_position_ids_with_gaps(variant, attention):
    """Half of the image tokens are gone; the others keep their positions."""
    _, want = golden_case(variant, "single_image")
    kept = want["pruned_keep_index"]
    with torch.no_grad():
        logits = model_of(variant, attention)(
            inputs_embeds=want["inputs_embeds"][:, kept],
            position_ids=kept[None],
            attention_mask=torch.ones(1, len(kept), dtype=torch.long),
        ).logits
    torch.testing.assert_close(logits, want["pruned_logits"], **LOGITS)


def test_position_ids_of_generate(variant, attention):
    inputs, want = golden_case(variant, "batch_left_padded")
    with torch.no_grad():
        logits = model_of(variant, attention)(**inputs, position_ids=want["position_ids_generate"]).logits
    torch.testing.assert_close(logits[:, -1], want["last_logits_generate_positions"], **LOGITS)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "fastmmoe"])
def test_experts_implementations(variant, experts):
    inputs, want = golden_case(variant, "single_image")
    model = model_of(variant, experts=experts)
    assert model.model.language_model.layers[1].mlp.experts.config._experts_implementation == experts
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, want["logits"], **LOGITS)


def test_bfloat16_stays_close(variant):
    """The root mean square error is 2.8 %, 2.4 % and 7.5 % of the logits' spread (in base a few experts flip)."""
    inputs, want = golden_case(variant, "single_image")
    with torch.no_grad():
        logits = model_of(variant, dtype=torch.bfloat16)(**inputs).logits
    error = (logits - want["logits"]).pow(2).mean().sqrt() / want["logits"].std()
    assert error < (0.15 if variant == "base_like" else 0.05)


@pytest.mark.parametrize(
    ("case", "normalised"),
    [
        ("group_limited_greedy", False),
        ("noaux_tc_pos_bias", True),
        ("noaux_tc_mixed_bias", True),
        # scores below 0 lose to the 0 that experts of other groups are given
        ("noaux_tc_negative_bias", True),
    ],
)
def test_router_with_groups(case, normalised):
    tensors = load_file(golden("base_like/gate_only_grouped.safetensors"))
    noaux = case.startswith("noaux_tc")
    config = DeepseekVLV2TextConfig(
        hidden_size=32,
        n_routed_experts=16,
        num_experts_per_tok=6,
        n_group=4,
        topk_group=2,
        topk_method="noaux_tc" if noaux else "group_limited_greedy",
        scoring_func="sigmoid" if noaux else "softmax",
        norm_topk_prob=normalised,
        routed_scaling_factor=2.5,
    )
    router = DeepseekVLV2Router(config)
    router.weight.data = tensors[f"{case}.weight"]
    if noaux:
        router.e_score_correction_bias.copy_(tensors[f"{case}.e_score_correction_bias"])
    want = tensors[f"{case}.dense_weights"].flatten(0, 1)  # [T, E], 0 where not chosen
    _, weights, ids = router(tensors[f"{case}.hidden"])
    assert ids.shape == (len(want), 6)
    got = torch.zeros_like(want).scatter_(1, ids, weights)
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ checkpoints


def test_partial_config_takes_official_defaults(variant):
    config = AutoConfig.from_pretrained(golden(variant))
    full = json.loads((golden(variant) / "config_full.json").read_text())
    assert isinstance(config, DeepseekVLV2Config)
    assert config.candidate_resolutions == full["candidate_resolutions"]
    for part in ("vision_config", "projector_config", "language_config"):
        ours = getattr(config, part)
        for name in {*vars(type(ours)()), "model_type"} & set(full[part]) - {"id2label"}:  # keys are no strings here
            assert getattr(ours, name) == full[part][name], name
    assert config.text_config is config.language_config
    assert config.language_config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_every_parameter_is_loaded_and_saved_back(variant, tmp_path):
    model, info = DeepseekVLV2ForCausalLM.from_pretrained(golden(variant), output_loading_info=True)
    assert not any(info.values()), info
    model.save_pretrained(tmp_path)
    before, after = load_file(golden(variant) / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "deepseek_vl_v2"
    official = json.loads((golden(variant) / "config.json").read_text())
    for part in ("vision_config", "projector_config", "language_config"):
        assert official[part].items() <= saved[part].items()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_new_model_saves_official_names(tmp_path):
    model = tiny_deepseek_vl2("base")
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "language.model.layers.1.mlp.experts.7.gate_proj.weight" in names
    assert "language.model.layers.1.self_attn.kv_b_proj.weight" in names
    assert {"view_seperator", "vision.blocks.0.attn.qkv.bias", "vision.attn_pool.kv.weight"} <= names
    assert not any(name.startswith("model.") for name in names)


def test_the_correction_bias_stays_float32():
    gate = model_of("base_like", dtype=torch.bfloat16).model.language_model.layers[1].mlp.gate
    assert (gate.weight.dtype, gate.e_score_correction_bias.dtype) == (torch.bfloat16, torch.float32)


OCR = {
    "model_type": "deepseek_vl_v2",
    "architectures": ["DeepseekOCRForCausalLM"],
    "vision_config": {"model_name": "deeplip_b_l", "model_type": "vision", "width": {"clip-l-14-224": {"heads": 16}}},
    "projector_config": {"projector_type": "linear", "n_embed": 1280},
    "language_config": {"hidden_size": 1280},
}


@pytest.mark.parametrize("auto", [AutoConfig, AutoModelForImageTextToText])
def test_deepseek_ocr_is_refused(auto, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OCR))
    with pytest.raises(ValueError, match="'deeplip_b_l' with projector 'linear' is not DeepSeek-VL2.*DeepSeek-OCR"):
        auto.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_tag": "1D"}, "tile_tag: expected 2D, got '1D'"),
        ({"projector_config": {"projector_type": "mlp_gelu"}}, "'mlp_gelu' is not DeepSeek-VL2"),
        ({"language_config": {"scoring_func": "relu"}}, "scoring_func: expected softmax or sigmoid, got 'relu'"),
        ({"language_config": {"n_routed_experts": 8, "topk_method": "gready"}}, "topk_method: .* got 'gready'"),
        ({"language_config": {"n_routed_experts": 8, "topk_method": "noaux_tc", "n_group": 3}}, "n_group=3"),
    ],
)
def test_a_config_without_meaning(change, message):
    with pytest.raises(ValueError, match=message):
        DeepseekVLV2Config(**change)


# ------------------------------------------------------------------------------------------------ images in the text


def test_lengths_of_the_token_layout():
    """The table of the released models: 14 features in a row of a tile."""
    side = tokens_per_side(384, 14, 2)
    assert side == 14
    table = {(1, 1): 421, (2, 1): 617, (1, 2): 631, (3, 1): 813, (2, 2): 1023, (3, 2): 1415, (1, 9): 2101, (9, 1): 1989}
    for (wide, high), tokens in table.items():
        assert num_image_tokens(wide, high, side) == tokens
        assert len(image_token_index(wide, high, side, 0, 1 + wide * high)) == tokens


def test_token_layout_by_hand():
    """2 x 1 tiles of 2 x 2 features, behind one image of one tile each: tiles 2, 3 and 4 of 5, 20 features in all."""
    newline, separator = 20, 21
    view = [8, 9, newline, 10, 11, newline]
    local = [12, 13, 16, 17, newline, 14, 15, 18, 19, newline]
    assert image_token_index(2, 1, 2, 2, 5).tolist() == [*view, separator, *local]
    assert image_token_index(2, 1, 2, 2, 5, global_first=False).tolist() == [*local, separator, *view]


@torch.no_grad()
def test_text_alone(variant):
    """No images, or images that the crops deny: the embedded text, whatever the placeholders' ids."""
    model = model_of(variant)
    inputs, _ = golden_case(variant, "single_image")
    text = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    want = model(**text).logits
    assert not torch.allclose(model(**inputs).logits, want, atol=0.1)
    none = dict(images=None, images_seq_mask=None, images_spatial_crop=None)
    assert torch.equal(model(**text, **none).logits, want)
    zero = inputs | {"images_spatial_crop": torch.zeros_like(inputs["images_spatial_crop"])}
    assert torch.equal(model(**zero).logits, want)
    assert torch.equal(generate(model, zero), generate(model, text))


@torch.no_grad()
def test_a_batch_of_text_and_images(variant):
    """Each sample alone gives what the batch gives; the mask may be of integers."""
    model = model_of(variant)
    inputs, want = golden_case(variant, "single_image")
    words = torch.arange(10, 40)
    n = inputs["input_ids"].shape[1]
    batch = {
        "input_ids": torch.cat((inputs["input_ids"], torch.nn.functional.pad(words, (n - 30, 0))[None])),
        "attention_mask": torch.stack((torch.ones(n), (torch.arange(n) >= n - 30).float())).long(),
        "images": torch.cat((inputs["images"], torch.zeros_like(inputs["images"]))),
        "images_seq_mask": torch.cat((inputs["images_seq_mask"], torch.zeros(1, n, dtype=torch.bool))).long(),
        "images_spatial_crop": torch.cat((inputs["images_spatial_crop"], torch.zeros(1, 1, 2, dtype=torch.long))),
    }
    logits = model(**batch).logits
    torch.testing.assert_close(logits[0], want["logits"][0], **LOGITS)
    torch.testing.assert_close(logits[1, n - 30 :], model(input_ids=words[None]).logits[0], **LOGITS)
    alone = model.generate(words[None], max_new_tokens=STEPS, do_sample=False)[:, -STEPS:]
    assert torch.equal(generate(model, batch), torch.cat((want["generated_ids"], alone)))


@torch.no_grad()
def test_the_mask_decides_not_the_ids():
    model = tiny_deepseek_vl2("small")
    batch = tiny_deepseek_batch()
    want = model(**batch).logits
    batch["input_ids"] = torch.where(batch["images_seq_mask"], 7, batch["input_ids"])
    assert torch.equal(model(**batch).logits, want)


@torch.no_grad()
def test_beams_follow_their_images():
    model = tiny_deepseek_vl2("tiny")
    batch = tiny_deepseek_batch()
    both = model.generate(**batch, num_beams=2, max_new_tokens=4, do_sample=False)[:, -4:]
    for sample in range(2):
        valid = batch["attention_mask"][sample].bool()
        alone = {
            name: tensor[sample : sample + 1][:, valid] if tensor.dim() == 2 else tensor[sample : sample + 1]
            for name, tensor in batch.items()
        }
        assert torch.equal(
            model.generate(**alone, num_beams=2, max_new_tokens=4, do_sample=False)[0, -4:], both[sample]
        )


@pytest.fixture
def turns():
    """(a prompt of two images, its first turn, which ends two words in front of the second image)."""
    prompt = tiny_deepseek_batch([[(1, 1), (2, 1)]])
    vision = prompt["images_seq_mask"]
    cut = int((vision[0].int().diff() == 1).nonzero()[1]) - 1
    first = {name: prompt[name][:, :cut] for name in ("input_ids", "attention_mask", "images_seq_mask")}
    first |= {"images": prompt["images"][:, :2], "images_spatial_crop": prompt["images_spatial_crop"][:, :1]}
    return prompt, first


NEW = {"images": slice(2, None), "images_spatial_crop": slice(1, None)}
SECOND_TURN = {
    "all-images": lambda prompt, new, cut: prompt,
    "new-images": lambda prompt, new, cut: prompt | new,
    "all-images-and-new-mask": lambda prompt, new, cut: (
        prompt | {"images_seq_mask": prompt["images_seq_mask"][:, cut:]}
    ),
    "new-images-and-mask": lambda prompt, new, cut: (
        prompt | new | {"images_seq_mask": prompt["images_seq_mask"][:, cut:]}
    ),
    "new-tokens": lambda prompt, new, cut: (
        prompt | new | {name: prompt[name][:, cut:] for name in ("input_ids", "images_seq_mask")}
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("form", SECOND_TURN)
def test_a_second_turn_with_a_new_image(form, turns):
    """In every form in which a conversation can be given to `generate` together with its cache."""
    model, (prompt, first) = tiny_deepseek_vl2("base"), turns
    cut = first["input_ids"].shape[1]
    new = {name: prompt[name][:, place] for name, place in NEW.items()}
    want = generate(model, prompt)
    cache = model(**first, use_cache=True).past_key_values
    assert torch.equal(generate(model, SECOND_TURN[form](prompt, new, cut), past_key_values=cache), want)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 7, 20, 200])
def test_a_prompt_in_chunks(size, turns):
    """Chunks end inside of images, and the two samples' images lie in different chunks."""
    model = tiny_deepseek_vl2("small")
    for prompt in (turns[0], tiny_deepseek_batch([[(1, 1)], [(1, 2), (2, 1)]])):
        assert torch.equal(generate(model, prompt, prefill_chunk_size=size), generate(model, prompt))


@torch.no_grad()
def test_a_second_turn_in_chunks(turns):
    model, (prompt, first) = tiny_deepseek_vl2("tiny"), turns
    cut, want = first["input_ids"].shape[1], generate(model, prompt)
    assert int(prompt["images_seq_mask"].sum()) > 30
    for inputs in (prompt, prompt | {name: prompt[name][:, place] for name, place in NEW.items()}):
        cache = model(**first, use_cache=True).past_key_values
        assert torch.equal(generate(model, inputs, past_key_values=cache, prefill_chunk_size=9), want)
    short = prompt | {"images_seq_mask": prompt["images_seq_mask"][:, cut:]}
    with pytest.raises(ValueError, match="images_seq_mask: "):
        cache = model(**first, use_cache=True).past_key_values
        generate(model, short, past_key_values=cache, prefill_chunk_size=9)


@torch.no_grad()
def test_embeddings_to_generate(turns):
    model, (prompt, _) = tiny_deepseek_vl2("base"), turns
    inputs = prompt | {"inputs_embeds": model.get_input_embeddings()(prompt["input_ids"])}
    assert torch.equal(generate(model, without(inputs, "input_ids")), generate(model, prompt))


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda prompt: prompt | {"images_spatial_crop": prompt["images_spatial_crop"].flip(2)[:, :1]},
        lambda prompt: prompt | {"images_spatial_crop": prompt["images_spatial_crop"][:, [0, 1, 1]].clamp_max(1)},
        lambda prompt: prompt | {"images_seq_mask": prompt["images_seq_mask"][:, 1:]},
    ],
    ids=["too-few", "too-many", "narrow-mask"],
)
def test_images_of_a_second_turn_that_do_not_fit(change, turns):
    model, (prompt, first) = tiny_deepseek_vl2("tiny"), turns
    cache = model(**first, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="images_seq_mask: "):
        generate(model, change(prompt | {"images": prompt["images"].repeat(1, 2, 1, 1, 1)}), past_key_values=cache)


def without(inputs, name):
    return {key: value for key, value in inputs.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: without(i, "input_ids"), "input_ids, inputs_embeds: expected exactly one"),
        (lambda i: without(i, "images_spatial_crop"), r"images_spatial_crop: expected \[B, images, 2\] along"),
        (lambda i: without(i, "images_seq_mask"), r"images_seq_mask: expected \[B, n\] along"),
        (lambda i: i | {"images_seq_mask": i["images_seq_mask"][:, 1:]}, "images_seq_mask: expected .* got"),
        (lambda i: i | {"images_seq_mask": i["input_ids"] < 0}, "sample 0's images make 25 tokens, the mask has 0"),
        (lambda i: i | {"images": i["images"][:, :1]}, "sample 0's images_spatial_crop needs 2 tiles, got 1"),
        (lambda i: i | {"images": i["images"][..., :31]}, r"images: expected \[B, tiles, 3, 32, 32\]"),
        (lambda i: i | {"images": i["images"][:1]}, "images_spatial_crop: expected 1 samples like images, got 2"),
        (lambda i: i | {"images_spatial_crop": -i["images_spatial_crop"]}, "images_spatial_crop: expected numbers of"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    model, batch = tiny_deepseek_vl2("tiny"), tiny_deepseek_batch()
    with pytest.raises(ValueError, match=message):
        model(**change(batch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i | {"images": list(i["images"])}, "images: expected a tensor, got list"),
        (lambda i: i | {"images_spatial_crop": i["images_spatial_crop"] / 2}, "images_spatial_crop: expected integers"),
    ],
)
def test_inputs_of_other_types(change, message):
    model, batch = tiny_deepseek_vl2("tiny"), tiny_deepseek_batch()
    with pytest.raises(TypeError, match=message):
        model(**change(batch))


def test_a_mask_of_images_without_samples():
    model, batch = tiny_deepseek_vl2("tiny"), tiny_deepseek_batch()
    with pytest.raises(ValueError, match=r"images_seq_mask: expected \[2, n\] like images"):
        generate(model, batch | {"images_seq_mask": batch["images_seq_mask"][0]})


def test_gradients_reach_every_part():
    model = tiny_deepseek_vl2("base").train()
    batch = tiny_deepseek_batch()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all(".vision_tower.head." in name for name in idle), idle
