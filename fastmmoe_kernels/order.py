"""The order of float32 numbers as one of integers, in which NaN has a place; a maximum of floats passes over it."""

import triton
import triton.language as tl

# below the key of every float32, -inf included
LOWEST_KEY = tl.constexpr(-(2**31))


@triton.jit
def ordered_key(x):
    """float32 -> int32 with the same order; NaN is the largest, as in torch.sort, and -0.0 ties with 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def key_value(key):
    """The float32 that has this `ordered_key`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
