"""Models and prompts of the prefill benchmarks: InternVL with a Qwen3-MoE language model, random weights."""

from dataclasses import dataclass
from math import isqrt

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen3MoeConfig

PAD_TOKEN, IMAGE_TOKEN, FIRST_WORD, VOCABULARY = 0, 1, 2, 1024
# pixels along the side of the square that becomes one vision token: patches of 14, four of which are joined
TOKEN_SIDE = 28


@dataclass(frozen=True)
class Size:
    """A language model's dimensions."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    intermediate: int


SIZES = {
    "tiny": Size(64, 8, 4, 2, 16, 8, 4, 32),  # to try the scripts
    "thin": Size(64, 48, 4, 2, 16, 8, 4, 32),  # as many layers as 30b and next to no arithmetic: Python dominates
    "small": Size(1024, 16, 16, 2, 64, 32, 8, 384),  # compute-bound on a CPU, in the proportions of 30b
    "30b": Size(2048, 48, 32, 4, 128, 128, 8, 768),  # InternVL3.5-30B-A3B
}


@dataclass(frozen=True)
class Case:
    """A batch of prompts, each with its image tiles between the first and the second half of its text.

    Attributes:
        tiles: image tiles of every sample; 0 makes a text-only prompt.
        text: text tokens per sample.
        tile_tokens: vision tokens per tile, a square number; InternVL has 256.
    """

    tiles: tuple[int, ...]
    text: int
    tile_tokens: int = 256

    @property
    def batch(self) -> int:
        return len(self.tiles)

    @property
    def is_mixed(self) -> bool:
        return len(set(self.tiles)) > 1

    @property
    def vision_tokens(self) -> tuple[int, ...]:
        """Per sample."""
        return tuple(tiles * self.tile_tokens for tiles in self.tiles)

    @property
    def padded_share(self) -> float:
        """Share of the batch's positions that hold padding."""
        lengths = [vision + self.text for vision in self.vision_tokens]
        return 1 - sum(lengths) / (max(lengths) * len(lengths))

    def __str__(self) -> str:
        low, high = min(self.vision_tokens), max(self.vision_tokens)
        vision = f"{low}" if low == high else f"{low} to {high}"
        return f"{vision} vision + {self.text} text tokens x {self.batch}"


def build_model(size: Size, device: torch.device, dtype: torch.dtype, tile_tokens: int = 256, seed: int = 0):
    """A model in evaluation mode, behind a vision tower of no weight: the language model is what is measured."""
    side = TOKEN_SIDE * isqrt(tile_tokens)
    vision = InternVLVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=side, patch_size=14
    )
    text = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, head_dim=size.head_dim, num_experts=size.experts,
        num_experts_per_tok=size.top_k, moe_intermediate_size=size.intermediate, intermediate_size=3 * size.hidden,
        norm_topk_prob=True,
    )  # fmt: skip
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    torch.manual_seed(seed)
    with device:
        model = InternVLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def build_samples(model: InternVLForConditionalGeneration, case: Case, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """The inputs of each sample by itself: random words and pixels."""
    generator = torch.Generator(model.device).manual_seed(seed)
    side = TOKEN_SIDE * isqrt(case.tile_tokens)
    samples = []
    for tiles in case.tiles:
        words = torch.randint(FIRST_WORD, VOCABULARY, (case.text,), generator=generator, device=model.device)
        image = torch.full((tiles * case.tile_tokens,), IMAGE_TOKEN, device=model.device)
        ids = torch.cat((words[: case.text // 2], image, words[case.text // 2 :]))[None]
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if tiles:
            shape = (tiles, 3, side, side)
            sample["pixel_values"] = torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)
        samples.append(sample)
    return samples


def join(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch of them, shorter ones padded on the left."""
    longest = max(sample["input_ids"].shape[1] for sample in samples)

    def padded(name: str, value: int) -> torch.Tensor:
        rows = (sample[name] for sample in samples)
        return torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=value) for row in rows])

    batch = {"input_ids": padded("input_ids", PAD_TOKEN), "attention_mask": padded("attention_mask", 0)}
    pixels = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
    return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})
