"""Tiny DeepSeek-VL2 models, one for each kind of attention and gate, and batches for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastmmoe.models.deepseek_vl2 import DeepseekVLV2Config, DeepseekVLV2ForCausalLM

from .tiny import FIRST_WORD, LAST_WORD, PAD_TOKEN, spread

IMAGE_TOKEN = 159
IMAGE_SIZE = 32  # 5 x 5 patches of 6 pixels, 3 x 3 features
SIDE = 3

MLA = dict(q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=14)
VARIANTS = {  # attention and gate of the released checkpoints
    "tiny": dict(use_mla=False, kv_lora_rank=None, qk_nope_head_dim=0, qk_rope_head_dim=0, v_head_dim=0),
    "small": MLA,
    "base": MLA
    | dict(scoring_func="sigmoid", topk_method="noaux_tc", n_group=1, topk_group=1, norm_topk_prob=True)
    | dict(routed_scaling_factor=2.0),
}


def tiny_deepseek_vl2(
    variant: str, seed: int = 0, *, attn_implementation: str = "sdpa", **text_overrides
) -> DeepseekVLV2ForCausalLM:
    """A float32 model in eval mode: 6 layers, the first one dense, 8 experts, top-4, hidden 64."""
    text = dict(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = DeepseekVLV2Config(
        vision_config=dict(
            model_name="siglip_tiny", image_size=IMAGE_SIZE, patch_size=6, width=16, layers=2, heads=2, mlp_ratio=2
        ),
        projector_config=dict(input_dim=16, n_embed=64),
        language_config=text | VARIANTS[variant] | text_overrides,
        attn_implementation=attn_implementation,
    )
    model = DeepseekVLV2ForCausalLM(config).float().eval()
    spread(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    model.generation_config.pad_token_id = PAD_TOKEN
    return model


def tiny_deepseek_batch(
    crops: Sequence[Sequence[tuple[int, int]]] = (((1, 1),), ((2, 1), (1, 2))),
    text: tuple[int, int, int] = (3, 4, 5),
    seed: int = 0,
    padding_side: str = "left",
) -> dict[str, torch.Tensor]:
    """The model's five inputs; `crops` has the local tiles (wide, high) of every image of every sample.

    `text` counts the words before the first image, between two images, and at the end. Sample b opens with b words
    more.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(FIRST_WORD, LAST_WORD + 1, (count,), generator=generator).tolist()

    before, between, after = text
    rows = []
    for sample, images in enumerate(crops):
        row = words(before + sample)
        for number, (wide, high) in enumerate(images):
            tokens = SIDE * (SIDE + 1) + 1 + high * SIDE * (wide * SIDE + 1)
            row += (words(between) if number else []) + [IMAGE_TOKEN] * tokens
        rows.append(row + words(after))
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), PAD_TOKEN)
    attention_mask = torch.zeros_like(input_ids)
    spatial_crop = torch.zeros(len(rows), max(1, *map(len, crops)), 2, dtype=torch.long)
    tiles = [sum(1 + wide * high for wide, high in images) for images in crops]
    pictures = torch.zeros(len(rows), max(1, *tiles), 3, IMAGE_SIZE, IMAGE_SIZE)
    for sample, row in enumerate(rows):
        place = slice(length - len(row), None) if padding_side == "left" else slice(len(row))
        input_ids[sample, place] = torch.tensor(row)
        attention_mask[sample, place] = 1
        spatial_crop[sample, : len(crops[sample])] = torch.tensor(list(crops[sample])).view(-1, 2)
        # coarse blobs plus noise: neighbouring patches are alike, as in pictures, but no two are equal
        coarse = torch.randn(tiles[sample], 3, 4, 4, generator=generator)
        blobs = torch.nn.functional.interpolate(coarse, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
        pictures[sample, : tiles[sample]] = 2 * blobs + 0.5 * torch.randn(blobs.shape, generator=generator)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "images": pictures,
        "images_seq_mask": input_ids == IMAGE_TOKEN,
        "images_spatial_crop": spatial_crop,
    }
