"""The kernel launches of one call of an op, to be repeated one at a time, on the same tensors."""

import functools
from collections.abc import Callable
from unittest import mock

from triton.runtime.jit import KernelInterface


def record_launches(call: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """Run `call`; kernel name -> its last launch, as a function that launches it again.

    What an op launches, and with which grid, is only written down in the op itself.
    """
    launches = {}
    subscript = KernelInterface.__getitem__

    def recording(kernel, grid):
        launch = subscript(kernel, grid)

        def run(*args, **kwargs):
            launches[kernel.__name__] = functools.partial(launch, *args, **kwargs)
            return launch(*args, **kwargs)

        return run

    with mock.patch.object(KernelInterface, "__getitem__", recording):
        call()
    return launches
