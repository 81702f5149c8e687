"""What `python -m fastmmoe_kernels.aot` compiles: a kernel with the types and constants of a real launch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelVariant:
    """One shipped configuration of a kernel. Each op's `kernel.py` lists its own in `aot_variants()`.

    Every argument of the kernel stands in `signature` or in `constants`. As in a launch, an integer argument that is
    always 1 (a contiguous dimension's stride) is a constant, and pointers and integers count as divisible by 16
    unless the kernel's decorator says not to specialise them or `unaligned` names them.

    Attributes:
        kernel: the `triton.jit` function.
        signature: argument -> Triton type, such as "*bf16", "*fp32", "*i32", "*u1" (bool), "i32", "i64", "fp32".
        constants: `constexpr` arguments, and integers that are always 1.
        num_warps: warps per program.
        num_stages: pipeline stages.
        targets: the targets it ships for.
        is_gemm: multiplies matrices: its main loop is judged, and its figures are compared with the baseline.
        needs_wgmma: a GEMM that must use wgmma on sm_90 when it multiplies 16-bit types: one of 64 rows or more.
        load_bytes: per thread, of a GEMM's narrowest asynchronous load; less than 16 where a tile has too few elements.
        unaligned: arguments of `signature` that are not divisible by 16.
    """

    kernel: object
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    is_gemm: bool = False
    needs_wgmma: bool = False
    load_bytes: int = 16
    unaligned: tuple[str, ...] = ()
