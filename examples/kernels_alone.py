"""The kernels alone, without any model: layout -> routing -> experts -> scores -> merge, on random tensors."""

import torch

from fastmmoe_kernels import (
    VisionLayout,
    last_query_attention,
    moe_experts,
    prune_batch,
    topk_routing,
)

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the same ops run as PyTorch code
B, n, H, E, K, I = 2, 48, 64, 8, 4, 32

# layout: 32 vision tokens of each sample
vision = torch.zeros(B, n, dtype=torch.bool, device=device)
vision[:, 8:40] = True
layout = VisionLayout.from_mask(vision)

# routing: text tokens take K experts, vision tokens two
hidden = torch.randn(B, n, H, device=device)
logits = torch.randn(B * n, E, device=device)
routing = topk_routing(logits, top_k=K, vision_mask=vision.flatten(), vision_top_k=2, return_probs=True)

# experts: empty slots hold E, and never reach the grouped GEMMs
gate_up, down = torch.randn(E, 2 * I, H, device=device) / 8, torch.randn(E, H, I, device=device) / 8
mixed = moe_experts(hidden.flatten(0, 1), gate_up, down, routing.ids, routing.weights)

# scores: what the last token attends to, mean over heads
query, key = torch.randn(B, 4, 16, device=device), torch.randn(B, 2, n, 16, device=device)
attention = last_query_attention(query, key, scale=0.25)

# merge: windows that are routed alike become one token, of the others the most attended stay
pruned = prune_batch(
    hidden, mixed.view(B, n, H), routing.probs.view(B, n, E), attention, layout,
    keep_ratio=0.5, merge_ratio=0.1, window=3, alpha=0.5, strategy="hybrid", merge_method="mlerp",
)  # fmt: skip
print("tokens:", n, "->", pruned.hidden.shape[1])
print("where the survivors stood:", pruned.index[0].tolist())
