"""DeepSeek-VL2 (`fastmmoe.models.deepseek_vl2`)."""

from typing import Any

import torch
from torch import nn

from fastmmoe.adapters.adapter import Adapter


def _vision_mask(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
    """`images_seq_mask`, by which the model itself goes; row ends and the view separator are vision tokens too."""
    images, mask, crop = (inputs.get(name) for name in ("images", "images_seq_mask", "images_spatial_crop"))
    if images is None or mask is None or crop is None:
        return None
    # where no sample begins with a crop, the model takes the batch for text
    return mask.bool() & crop[:, :1].all(-1).any().to(mask.device)


DEEPSEEK_VL2 = Adapter(
    parent_type="deepseek_vl_v2",
    text_type="deepseek_v2",
    vision_mask=_vision_mask,
    routing_options=lambda gate: {
        "top_k": gate.top_k,
        "scoring": gate.scoring_func,
        "norm_topk_prob": gate.norm_topk_prob,
        "correction_bias": gate.e_score_correction_bias,
        "n_group": gate.n_group,
        "topk_group": gate.topk_group,
        "routed_scaling_factor": float(gate.routed_scaling_factor),
    },
)
