"""Models whose weights several processes share (DTensor): whose are split, and among which of them."""

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# what a mesh calls the dimension along which a layer's own work is split, in torch's recipes and in transformers
WORK = ("tp", "ep")


def holds_fsdp_unit(module: nn.Module) -> bool:
    """Whether FSDP makes weights in it whole, for calls of theirs in which all processes take part."""
    return any(isinstance(inside, FSDPModule) for inside in module.modules())


def work_group(layer: nn.Module, part: nn.Module, name: str) -> ProcessGroup | None:
    """The processes among which the heads or the experts of a part of a layer are split; None: each has them all.

    Weights that FSDP spreads do not count: they are whole while the layer runs.

    Args:
        name: of the part, for the message.

    Raises:
        ValueError: weights split along a mesh dimension that does not say what for.
    """
    is_gathered = holds_fsdp_unit(layer)
    for weight in part.parameters():
        if not isinstance(weight, DTensor):
            continue
        mesh = weight.device_mesh
        names = mesh.mesh_dim_names or (None,) * mesh.ndim
        for dim, placement in enumerate(weight.placements):
            if placement.is_replicate() or mesh.size(dim) == 1:
                continue
            if names[dim] in WORK:
                return mesh.get_group(dim)
            if not is_gathered:
                raise ValueError(
                    f"model: weights of {name} are split along a dimension of their device mesh named {names[dim]!r}, "
                    f"expected {' or '.join(map(repr, WORK))}, as transformers' DistributedConfig names them"
                )
    return None
