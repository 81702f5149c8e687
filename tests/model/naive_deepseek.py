"""The oracle of naive.py for DeepSeek-VL2: its attention (two kinds), its gate (two kinds) and its shared experts.

Everything else, the pruning above all, is naive.py's. From the model it takes its weights and its images' tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import silu

from . import naive


class Sample(naive.Sample):
    """One prompt of DeepSeek-VL2."""

    def query_key_value(self, layer: int, x: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        text = self.text
        heads = text.num_attention_heads
        if not text.use_mla:
            query, key, value = (
                (self.weight(layer, f"self_attn.{name}_proj.weight") @ x).view(heads, -1) for name in "qkv"
            )
            return self.rotate(query, position), self.rotate(key, position), value
        query = (self.weight(layer, "self_attn.q_proj.weight") @ x).view(heads, -1)
        latent = self.weight(layer, "self_attn.kv_a_proj_with_mqa.weight") @ x
        shared = self.turn_pairs(latent[text.kv_lora_rank :], position)  # the rotary part of every head's key
        latent = latent[: text.kv_lora_rank]
        latent = latent / math.sqrt(latent @ latent / len(latent) + 1e-6)
        latent = self.weight(layer, "self_attn.kv_a_layernorm.weight") * latent
        both = (self.weight(layer, "self_attn.kv_b_proj.weight") @ latent).view(heads, -1)
        nope = text.qk_nope_head_dim
        query = torch.stack([torch.cat([head[:nope], self.turn_pairs(head[nope:], position)]) for head in query])
        key = torch.stack([torch.cat([head[:nope], shared]) for head in both])
        return query, key, both[:, nope:]

    def turn_pairs(self, x: Tensor, position: int) -> Tensor:
        """RoPE over neighbours: turn each pair (x[2 j], x[2 j + 1]) by its own angle."""
        turned = x.clone()
        for j in range(len(x) // 2):
            angle = position * self.text.rope_parameters["rope_theta"] ** (-2 * j / len(x))
            first, second = float(x[2 * j]), float(x[2 * j + 1])
            turned[2 * j] = first * math.cos(angle) - second * math.sin(angle)
            turned[2 * j + 1] = second * math.cos(angle) + first * math.sin(angle)
        return turned

    def gate(self, layer: int, x: Tensor) -> Tensor:
        logits = self.weight(layer, "mlp.gate.weight") @ x
        return logits.sigmoid() if self.text.scoring_func == "sigmoid" else logits.softmax(0)

    def mlp(self, layer: int, x: Tensor, vision: bool) -> Tensor:
        output = super().mlp(layer, x, vision)
        if layer < self.text.first_k_dense_replace:
            return output
        names = ("gate", "up", "down")
        gate, up, down = (self.weight(layer, f"mlp.shared_experts.{name}_proj.weight") for name in names)
        return output + down @ (silu(gate @ x) * (up @ x))

    def route(self, layer: int, probs: Tensor, vision: bool) -> list[tuple[int, float]]:
        text, scores = self.text, probs.tolist()
        worth = scores
        if text.topk_method == "noaux_tc":
            bias = self.weight(layer, "mlp.gate.e_score_correction_bias").tolist()
            worth = [score + b for score, b in zip(scores, bias, strict=True)]
        full, gap = naive.best(worth, text.num_experts_per_tok)
        chosen = full
        if vision and self.config.vision_top_k is not None and layer >= self.config.reduction_layer:
            chosen, gap = naive.best(worth, self.config.vision_top_k)
        self.margins.note("routing", gap)
        total = 1.0 if text.norm_topk_prob else sum(scores[expert] for expert in full)
        factor = text.routed_scaling_factor * total / sum(scores[expert] for expert in chosen)
        return [(expert, factor * scores[expert]) for expert in chosen]


@torch.no_grad()
def samples(model, inputs: dict[str, Tensor], config, dtype: torch.dtype, kind: type = Sample) -> list[naive.Sample]:
    """One prefilled sample per row of a padded batch, padding taken off; `kind` makes another method's."""
    weights = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    images = model.get_image_features(inputs["images"], inputs["images_spatial_crop"])
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["images_seq_mask"], images, strict=True)
    out = []
    for ids, valid, vision, sequence in rows:
        vision = vision[valid].bool()
        embeddings = weights["model.language_model.embed_tokens.weight"][ids[valid]].clone()
        embeddings[vision] = sequence.to(dtype)
        out.append(kind(weights, model.config.language_config, config, embeddings, vision.tolist()))
    return out


def greedy(model, inputs: dict[str, Tensor], config, max_new_tokens: int) -> list[naive.Generation]:
    """Greedy continuation of each sample of a padded batch, in float64."""
    return naive.greedy(model, inputs, config, max_new_tokens, samples=samples)
