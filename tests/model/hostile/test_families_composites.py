"""Text models of the registry under other multimodal models, and models that hold more or less than one pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fastmmoe
from fastmmoe import FastMMoEConfig

from .. import naive_loop, tiny_families
from ..families import LOOPS
from ..test_parity_families import extended, settings_of
from ..tiny_families import IMAGE, build, picture
from .families import built, config_of, generate, prompt

pytestmark = pytest.mark.usefixtures("no_gradients")

CLIP = dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, image_size=16, patch_size=4, projection_dim=16)  # fmt: skip
SIGLIP = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=32, num_hidden_layers=2,
              num_attention_heads=2, image_size=16, patch_size=4)  # fmt: skip
# the family whose text model is taken; llama4's, whose vision tokens have no fewer experts, too
TEXTS = {"qwen3_moe": "internvl_qwen3_moe", "gpt_oss": "internvl_gpt_oss", "mistral4": "mistral3_mistral4",
         "deepseek_v3": "kimi_k25", "lfm2_moe": "lfm2_vl_lfm2_moe", "glm4v_moe_text": "glm4v_moe",
         "qwen3_5_moe_text": "qwen3_5_moe", "llama4_text": "llama4", "aria_text": "aria"}  # fmt: skip


def parent_of(kind: str) -> tuple[dict, int, dict]:
    """(its config without the text model's, image tokens, features)."""
    tiles = {"pixel_values": picture(1, 2, 3, 16, 16, seed=1), "image_sizes": torch.tensor([[16, 16]])}
    tile = {"pixel_values": picture(1, 3, 16, 16, seed=1)}
    grids = dict(image_token_index=IMAGE, image_grid_pinpoints=[[16, 16]])
    internvl, internvl_inputs = built("internvl_qwen3_moe")
    return {
        "internvl": (
            dict(vision_config=internvl.config.vision_config.to_dict(), image_token_id=IMAGE, image_seq_length=16),
            16,
            {"pixel_values": internvl_inputs["pixel_values"]},
        ),
        "llava": (dict(vision_config=CLIP, image_token_index=IMAGE), 16, tile),
        "llava_next": (dict(vision_config=CLIP, **grids), 36, tiles),
        "llava_onevision": (dict(vision_config=SIGLIP, video_token_index=91, **grids), 36, tiles),
        "mistral3": (
            dict(vision_config=built("mistral3_mistral4")[0].config.vision_config.to_dict(), image_token_index=IMAGE,
                 spatial_merge_size=2, vision_feature_layer=-1),
            16,
            {"pixel_values": picture(1, 3, 32, 32, seed=1), "image_sizes": torch.tensor([[32, 32]])},
        ),
        "aya_vision": (
            dict(vision_config=SIGLIP, image_token_index=IMAGE, downsample_factor=2, alignment_intermediate_size=32),
            4,
            tile,
        ),
        "ovis2": (
            dict(
                vision_config=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                   image_size=16, patch_size=4, hidden_stride=2, vocab_size=32,
                                   num_visual_indicator_tokens=5),
                image_token_id=IMAGE, visual_indicator_token_ids=[85, 86, 87, 88, 89], hidden_size=32,
                vocab_size=tiny_families.VOCABULARY,
            ),
            4,
            tile,
        ),
        "cohere2_vision": (
            dict(vision_config=SIGLIP, image_token_id=IMAGE, downsample_factor=2, alignment_intermediate_size=32),
            4,
            tile,
        ),
    }[kind]  # fmt: skip


PAIRS = [(parent, "qwen3_moe") for parent in ("llava", "llava_next", "llava_onevision", "mistral3", "aya_vision",
                                              "ovis2", "cohere2_vision")]  # fmt: skip
PAIRS += [("internvl", text) for text in TEXTS if text not in ("qwen3_moe", "gpt_oss")]
PAIRS += [("llava_next", "gpt_oss"), ("llava_onevision", "mistral4")]


def composite(parent: str, text: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    options, n_image, features = parent_of(parent)
    attention = "eager" if text == "gpt_oss" else "sdpa"
    text_config = built(TEXTS[text])[0].config.text_config.to_dict()
    model = build(parent, 0, attention=attention, text_config=text_config, tie_word_embeddings=False, **options)
    return model, tiny_families.prompt(n_image) | features


@pytest.mark.parametrize(("parent", "text"), PAIRS, ids=[f"{parent}+{text}" for parent, text in PAIRS])
def test_a_composite_equals_the_oracle(parent, text):
    model, inputs = composite(parent, text)
    family, config = LOOPS[TEXTS[text]], config_of(TEXTS[text])
    inner = next(module for module in model.modules() if hasattr(module, "layers") and hasattr(module, "embed_tokens"))
    path = next(path for path, module in model.named_modules() if module is inner)
    stock, n = model(**inputs).logits, inputs["input_ids"].shape[1]
    with fastmmoe.enabled(model, config):
        output = generate(model, inputs, 3)
    assert torch.equal(model(**inputs).logits, stock)
    whole = extended(inputs, output.sequences[:, n:])
    vision = (whole["input_ids"][0] == IMAGE).tolist()
    want = naive_loop.run(model, replace(family.parts, text=path), settings_of(config), whole, vision, [n, 1, 1])
    assert len(want.kept[0]) < n
    for got, expected in zip(output.logits, want.logits, strict=True):
        torch.testing.assert_close(got[0], expected[-1], rtol=0, atol=1e-3)


def test_a_text_model_by_itself_is_refused_by_name():
    config = built("internvl_qwen3_moe")[0].config.text_config
    model = AutoModelForCausalLM.from_config(config).eval()
    for module in (model, model.model, built("internvl_qwen3_moe")[0].model.language_model):
        with pytest.raises(ValueError, match="a qwen3_moe text model by itself has no vision tokens"):
            fastmmoe.enable(module, FastMMoEConfig(vision_top_k=2))


@pytest.mark.parametrize(("kind", "reason"), [("diffusion_gemma", "denoises blocks"), ("inkling_mm_model", "its gate")])
def test_a_preset_of_a_refused_family_says_why(kind, reason):
    with pytest.raises(ValueError, match=f"is not supported: .*{reason}"):
        FastMMoEConfig.preset(AutoConfig.for_model(kind))


def omni(accept_hidden_layer: int) -> torch.nn.Module:
    """Qwen3-Omni with its thinker, talker and vocoder."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    thinker = built("qwen3_omni_moe_thinker")[0]
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8)  # fmt: skip
    experts = dict(moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=12)
    config = Qwen3OmniMoeConfig(
        thinker_config=thinker.config.to_dict(),
        talker_config=dict(
            code_predictor_config=sizes | dict(num_code_groups=4),
            text_config=sizes | experts | dict(rope_parameters=tiny_families.QWEN_ROPE),
            thinker_hidden_size=32, num_code_groups=4, accept_hidden_layer=accept_hidden_layer, image_token_id=IMAGE,
            video_token_id=91, audio_token_id=92, spatial_merge_size=2, codec_eos_token_id=60, codec_nothink_id=50,
            codec_think_bos_id=51, codec_think_eos_id=52, codec_pad_id=53, codec_bos_id=54, speaker_id={"ethan": 55},
        ),
        code2wav_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            codebook_size=64, num_quantizers=4, decoder_dim=16, upsample_rates=[2, 2], upsampling_ratios=[2],
        ),
        enable_audio_output=True, im_start_token_id=80, im_end_token_id=81, system_token_id=82, user_token_id=83,
        assistant_token_id=84, tts_pad_token_id=85, tts_bos_token_id=86, tts_eos_token_id=87,
    )  # fmt: skip
    model = Qwen3OmniMoeForConditionalGeneration(config).eval()
    tiny_families.randomise(model, 0)
    model.thinker.load_state_dict(thinker.state_dict())
    return model


def test_the_thinker_of_a_whole_omni_model():
    thinker, config = built("qwen3_omni_moe_thinker")[0], config_of("qwen3_omni_moe_thinker")
    inputs, model = prompt("qwen3_omni_moe_thinker", ((5, 6), (7, 8))), omni(4)
    assert FastMMoEConfig.preset(model, retention=0.5) == FastMMoEConfig.preset(thinker, retention=0.5)
    with fastmmoe.enabled(thinker, config):
        want = generate(thinker, inputs, 3).sequences
    with fastmmoe.enabled(model, config):
        got = model.thinker.generate(**inputs, do_sample=False, min_new_tokens=3, max_new_tokens=3,
                                     suppress_tokens=[*range(IMAGE, tiny_families.VOCABULARY)])  # fmt: skip
    assert torch.equal(got, want)


def test_the_talker_of_a_whole_omni_model_and_a_pruned_prompt():
    """`generate` of the whole model speaks by default: the talker looks the prompt's tokens up in hidden states."""
    model, config = omni(4), config_of("qwen3_omni_moe_thinker")
    inputs = prompt("qwen3_omni_moe_thinker", ((80, 83, 5, 6), (7, 81, 80, 84)))
    with fastmmoe.enabled(model, config):
        with pytest.raises(ValueError, match="output_hidden_states.*return_audio=False"):
            model.generate(**inputs, thinker_max_new_tokens=3, speaker="Ethan")
        silent = model.generate(**inputs, thinker_max_new_tokens=3, return_audio=False)
        alone = model.thinker.generate(**inputs, max_new_tokens=3)
    assert torch.equal(getattr(silent, "sequences", silent), alone)
