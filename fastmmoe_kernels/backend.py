"""Which implementation of an op runs: the Triton kernel or the PyTorch reference."""

import importlib.util
import os

import torch

BACKENDS = ("auto", "triton", "torch")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def resolve_backend(backend: str, tensor: torch.Tensor) -> str:
    """Turn `backend` ("auto", "triton" or "torch") into "triton" or "torch" for the device of `tensor`.

    "auto" takes Triton on a CUDA or HIP tensor when Triton is installed, the torch backend otherwise.

    Raises:
        ValueError: `backend` is not one of the three names.
        RuntimeError: "triton" was asked for and Triton is missing, or `tensor` lies on a device that Triton
            cannot run on and the interpreter is off.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "triton" if tensor.is_cuda and TRITON_INSTALLED else "torch"
    if backend == "triton" and not TRITON_INSTALLED:
        raise RuntimeError("backend='triton': Triton is not installed (pip install 'fastmmoe[triton]')")
    if backend == "triton" and not tensor.is_cuda and not interpreting():
        raise RuntimeError(
            f"backend='triton': a tensor on {tensor.device.type!r} needs TRITON_INTERPRET=1 in the environment "
            "before Python starts; use backend='auto' or 'torch' to run on this device"
        )
    return backend


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    # what Triton takes for true; `triton.knobs.runtime.interpret` itself cannot be traced by torch.compile
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "y", "yes")
