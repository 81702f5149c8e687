"""Window redundancy in PyTorch: the definition, and the CPU path."""

import torch


def window_scores_reference(
    probs: torch.Tensor,  # [B, n, E]
    importance: torch.Tensor,  # [B, n]
    run_rank: torch.Tensor,  # [B, n]
    window: int,
    alpha: float,
    strategy: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(S, A, C, number of windows): float32 [B, n], a window's values at its first token and (0, 0, -inf) elsewhere;
    int32 [B]. No host read: the form in which `prune_batch` uses the scores."""
    vision = run_rank >= 0
    p = torch.where(vision.unsqueeze(-1), probs, 0.0)
    a = torch.where(vision, importance, 0.0)

    # every vision token points at the first token of its window; sums over a window are sums into that token
    head = window_head(run_rank, window)  # [B, n]
    is_head = vision & (run_rank % window == 0)
    size = torch.zeros_like(a).scatter_add_(1, head, vision.float()).clamp_min_(1.0)
    head_row = head.unsqueeze(-1).expand_as(p)
    mean = torch.zeros_like(p).scatter_add_(1, head_row, p) / size.unsqueeze(-1)
    m = mean.gather(1, head_row)
    cosine = (p * m).sum(-1) / (p.norm(dim=-1) * m.norm(dim=-1)).clamp_min(1e-20)
    similarity = torch.zeros_like(a).scatter_add_(1, head, cosine) / size
    similarity = torch.where(is_head & (size > 1), similarity, 0.0)

    attention = torch.zeros_like(a).scatter_add_(1, head, a) / size
    if attention.numel():
        # of the windows that have a number: NaN is a matter of its own window
        most = torch.where(is_head & (attention == attention), attention, float("-inf")).amax(1, keepdim=True)
        attention = torch.where(is_head, attention / (most + 1e-10), 0.0)

    if strategy == "hybrid":
        redundancy = alpha * similarity - (1.0 - alpha) * attention
    else:
        redundancy = similarity if strategy == "routing_similarity" else -attention
    redundancy = torch.where(is_head, redundancy, float("-inf"))
    return similarity, attention, redundancy, is_head.sum(1, dtype=torch.int32)


def window_head(run_rank: torch.Tensor, window: int) -> torch.Tensor:
    """int64 [B, n]: position of the first token of each vision token's window; a token's own position elsewhere."""
    position = torch.arange(run_rank.shape[1], device=run_rank.device)
    return torch.where(run_rank >= 0, position - run_rank % window, position)
