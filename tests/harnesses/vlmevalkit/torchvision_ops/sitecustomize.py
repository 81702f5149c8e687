"""The operators that torchvision's CUDA build takes for granted, and that PyTorch's CPU build does not load from it."""

import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
