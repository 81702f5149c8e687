"""Sizes of launches."""


def cdiv(count: int, block: int) -> int:
    """Blocks that hold `count` items. `triton.cdiv` says the same, but takes 3 microseconds on the host."""
    return -(-count // block)
