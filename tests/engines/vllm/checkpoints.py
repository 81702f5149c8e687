"""Tiny checkpoints that vLLM serves on a CPU: heads of 32, widths by which its kernels divide, the hub's weight order.

No matrix of experts is square: its order could not be told.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.model import tiny_checkpoints

TEXT = dict(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=8, intermediate_size=64,
    moe_intermediate_size=96, num_experts=8, num_experts_per_tok=4, norm_topk_prob=True, max_position_embeddings=1024,
)  # fmt: skip
SIZES = {
    "qwen3_vl_moe": {
        "text_config": TEXT
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [8, 4, 4],
                "mrope_interleaved": True,
            }
        },
        "vision_config": {"out_hidden_size": 64},
    },
    "internvl_qwen3_moe": {"text_config": TEXT},
    "glm4v_moe": {
        "text_config": TEXT
        | {
            "use_qk_norm": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
                "partial_rotary_factor": 0.5,
            },
        },
        "vision_config": {"out_hidden_size": 64, "hidden_size": 64, "intermediate_size": 64},
    },
}
# stored with inputs first, as the hub has them
TRANSPOSED = {"qwen3_vl_moe": (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")}


def save(name: str, directory: Path, seed: int = 0) -> Path:
    """Write a checkpoint that both transformers and vLLM read."""
    tiny_checkpoints.save(name, directory, seed, SIZES[name])
    weights = directory / "model.safetensors"
    stored = load_file(weights)
    for key, tensor in stored.items():
        if key.endswith(TRANSPOSED.get(name, ())):
            stored[key] = tensor.mT.contiguous()
    save_file(stored, weights, {"format": "pt"})
    return directory
