"""A tiny InternVL with a Qwen3-MoE text model, and batches for it: no hub, no processor, no picture files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen3MoeConfig

PAD_TOKEN = 0
IMAGE_TOKEN = 159
FIRST_WORD, LAST_WORD = 1, 149  # ids of ordinary text
IMAGE_SIZE = 32
TOKENS_PER_TILE = 16  # 8 x 8 patches of 4 pixels, pixel shuffle 0.5


def tiny_internvl(
    seed: int = 0, *, attn_implementation: str = "sdpa", **text_overrides
) -> InternVLForConditionalGeneration:
    """A float32 model in eval mode: 6 layers of 8 experts, top-4, hidden 64; equal seeds give equal weights."""
    text = dict(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=PAD_TOKEN,
    )
    vision = InternVLVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[IMAGE_SIZE, IMAGE_SIZE],
        patch_size=[4, 4],
        layer_scale_init_value=0.5,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen3MoeConfig(**(text | text_overrides)),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
        attn_implementation=attn_implementation,
    )
    model = InternVLForConditionalGeneration(config).float().eval()
    spread(model, seed)
    with torch.no_grad():  # as in trained models, an image token is not something to say
        model.lm_head.weight[IMAGE_TOKEN] = 0.0
    # no end-of-sequence token: every greedy run has the length it was asked for
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD_TOKEN
    return model


@torch.no_grad()
def spread(model: torch.nn.Module, seed: int) -> None:
    """Redraw every weight at unit scale.

    The default 0.02 leaves routing, attention and logits nearly uniform: every choice would be a near-tie and
    a wrong result would stay within any tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "lambda_" in name:  # the vision tower's layer scale stays as configured
            continue
        if name.endswith("bias"):
            weight.copy_(0.1 * noise)
        elif weight.ndim == 1:  # norms; sharper queries and keys make the attention peaked
            weight.copy_((1.5 if "q_norm" in name or "k_norm" in name else 1.0) * (1 + 0.2 * noise))
        elif name.endswith(("embed_tokens.weight", "position_embeddings", "cls_token")):
            weight.copy_(noise)
        else:
            gain = 3.0 if "lm_head" in name else 2.0 if "gate.weight" in name else 1.2 if "experts" in name else 1.0
            fan_in = weight.shape[-1] if weight.ndim == 3 else weight[0].numel()  # experts are [E, out, in]
            weight.copy_(gain * fan_in**-0.5 * noise)


def tiny_batch(
    model: InternVLForConditionalGeneration,
    images_per_sample: Sequence[int] = (1, 2),
    text: tuple[int, int, int] = (3, 4, 5),
    seed: int = 0,
    padding_side: str = "left",
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` `[B, n]` and `pixel_values` `[images, 3, 32, 32]` (left out if there is no image).

    `text` counts the words before the first image, between two images (0: one run of vision tokens), and at the end.
    Sample b opens with b words more, so that samples of equal image counts still differ in length.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(FIRST_WORD, LAST_WORD + 1, (count,), generator=generator).tolist()

    before, between, after = text
    rows = []
    for sample, images in enumerate(images_per_sample):
        row = words(before + sample)
        for image in range(images):
            row += (words(between) if image else []) + [model.config.image_token_id] * TOKENS_PER_TILE
        rows.append(row + words(after))
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), PAD_TOKEN)
    attention_mask = torch.zeros_like(input_ids)
    for sample, row in enumerate(rows):
        place = slice(length - len(row), None) if padding_side == "left" else slice(len(row))
        input_ids[sample, place] = torch.tensor(row)
        attention_mask[sample, place] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if images := sum(images_per_sample):
        # coarse blobs plus noise: neighbouring patches are alike, as in pictures, but no two are equal
        coarse = torch.randn(images, 3, 4, 4, generator=generator)
        blobs = torch.nn.functional.interpolate(coarse, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
        batch["pixel_values"] = 2 * blobs + 0.5 * torch.randn(blobs.shape, generator=generator)
    return batch
