"""What Triton's interpreter needs to run our kernels beside the NumPy that is installed."""

from functools import cache


@cache
def mend_interpreter() -> None:
    """Let kernels loop over an argument under Triton 3.6 and NumPy 2.5 or newer. Call it before the first launch.

    That Triton takes the argument's value as `int()` of an array of one element, which that NumPy refuses.
    """
    import triton

    if not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index
