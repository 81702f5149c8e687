"""Registration of an op with torch.library."""

import inspect
import pkgutil
from collections.abc import Callable
from functools import cache

import torch

from fastmmoe_kernels.backend import interpreting
from fastmmoe_kernels.interpreter import mend_interpreter


def register(name: str, reference: Callable, triton: str, fake: Callable) -> torch._ops.OpOverload:
    """Make `fastmmoe::name` of a typed function that changes none of its arguments.

    As `torch.library.custom_op` does, but without most of its Python in every call, of which a prefill makes a hundred.
    Autocast changes nothing of what the op computes.

    Args:
        reference: the torch backend; computes the outputs on the device of its first argument, a tensor.
        triton: the Triton backend, "module:function", imported when first called.
        fake: takes the same arguments and returns empty outputs of the right shapes, dtypes and devices.

    Returns:
        The op. It takes the arguments of `reference`, with the fields of the last in its place if that is a NamedTuple,
        then "triton" or "torch". A backward pass through it raises NotImplementedError.
    """
    signature = inspect.signature(reference)
    *parameters, last = signature.parameters.values()
    start, options = len(parameters), last.annotation
    has_options = hasattr(options, "_fields")
    types = options.__annotations__ if has_options else {last.name: last.annotation}
    parameters += [last.replace(name=field, annotation=kind) for field, kind in (types | {"backend": str}).items()]

    @cache
    def load_triton() -> Callable:
        if interpreting():
            mend_interpreter()
        return pkgutil.resolve_name(triton)

    def call(function: Callable, arguments: tuple):
        if has_options:
            return function(*arguments[:start], options(*arguments[start:-1]))
        return function(*arguments[:-1])

    def run(*arguments):
        first = arguments[0]
        # `first.device` would take 2 microseconds of every call
        device_type = "cuda" if first.is_cuda else "cpu" if first.is_cpu else first.device.type
        # autocast would round what is promised in float32
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return run(*arguments)
        # Triton launches on the current device, which need not be that of a model's later layers
        if device_type == "cuda" and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return run(*arguments)
        return call(load_triton() if arguments[-1] == "triton" else reference, arguments)

    def run_fake(*arguments):
        return call(fake, arguments)

    def no_backward(ctx, *gradients):
        raise NotImplementedError(f"fastmmoe::{name} has no backward pass: it is for inference only")

    # what infer_schema reads: torch.library has no type for a NamedTuple
    run.__signature__ = signature.replace(parameters=parameters)
    qualified = f"fastmmoe::{name}"
    torch.library.define(qualified, torch.library.infer_schema(run, mutates_args=()))
    torch.library.impl(qualified, "default", run)
    torch.library.register_fake(qualified, run_fake)
    torch.library.register_autograd(qualified, no_backward)
    return getattr(torch.ops.fastmmoe, name).default
