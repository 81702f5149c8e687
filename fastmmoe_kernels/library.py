"""Registration of an op with torch.library."""

from collections.abc import Callable

import torch


def register(name: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Make `fastmmoe::name` of a typed function that changes none of its arguments.

    As `torch.library.custom_op` does, but without most of its Python in every call, of which a prefill makes a hundred.

    Args:
        run: computes the outputs on the device of its first argument, a tensor.
        fake: takes the same arguments and returns empty outputs of the right shapes, dtypes and devices.

    Returns:
        The op. A backward pass through it raises NotImplementedError.
    """

    def no_backward(ctx, *gradients):
        raise NotImplementedError(f"fastmmoe::{name} has no backward pass: it is for inference only")

    def run_on_its_device(first: torch.Tensor, *others):
        # Triton launches on the current device, which need not be that of a model's later layers
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return run(first, *others)
        return run(first, *others)

    qualified = f"fastmmoe::{name}"
    torch.library.define(qualified, torch.library.infer_schema(run, mutates_args=()))
    torch.library.impl(qualified, "default", run_on_its_device)
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, no_backward)
    return getattr(torch.ops.fastmmoe, name).default
