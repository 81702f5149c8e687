"""Muon: momentum whose update is made orthogonal (Jordan et al., 2024), for the matrices of the language model."""

from collections import defaultdict

import torch
import torch.distributed as dist


class Muon(torch.optim.Optimizer):
    """For parameters [..., O, I]: every trailing matrix is orthogonalised for itself, all of one shape in one go.

    `splits` says into how many matrices the rows of a parameter fall: gate and up lie in one tensor.
    """

    def __init__(self, parameters: list[torch.Tensor], lr: float, splits: list[int], momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.splits = splits

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter, split in zip(group["params"], self.splits, strict=True):
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])
                matrices = update.reshape(-1, parameter.shape[-2] // split, parameter.shape[-1])
                wide = matrices.shape[1] <= matrices.shape[2]
                matrices = matrices if wide else matrices.mT
                by_shape[matrices.shape[1:]].append((parameter, matrices, wide))
            for entries in by_shape.values():
                orthogonal = shared_orthogonalise(torch.cat([matrices for _, matrices, _ in entries]))
                parts = orthogonal.split([len(matrices) for _, matrices, _ in entries])
                for (parameter, _, wide), part in zip(entries, parts, strict=True):
                    part = part if wide else part.mT
                    scale = max(1, part.shape[-2] / part.shape[-1]) ** 0.5
                    parameter.sub_(part.reshape(parameter.shape), alpha=group["lr"] * scale)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Roughly U V^T of every matrix's U S V^T, [N, O, I] with O <= I, by Newton-Schulz iterations."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def shared_orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """`orthogonalise` of matrices [N, O, I] that all processes have alike, every process computing its part."""
    processes = dist.get_world_size()
    part = -(-len(matrices) // processes)
    padded = torch.cat((matrices, matrices[: part * processes - len(matrices)]))
    results = [torch.empty_like(chunk) for chunk in padded.split(part)]
    dist.all_gather(results, orthogonalise(padded.split(part)[dist.get_rank()]))
    return torch.cat(results)[: len(matrices)]
