"""`with` blocks on a model: what holds for the thread or asyncio task that entered one, and for nobody else."""

from contextvars import ContextVar
from typing import TYPE_CHECKING

from fastmmoe.prefill.plan import Plan
from fastmmoe_kernels import VisionLayout

if TYPE_CHECKING:
    from fastmmoe.prefill.installation import Installation


class Block:
    """A `with` block on a model. Blocks of one thread or task form a list, the innermost first.

    Attributes:
        installation: on whose model; None once the block is left.
        plan: what is in force in the block; None: the stock model.
        layout: what every forward in the block looks like; such a block says nothing of what is in force. None: a block
            that does.
        outer: the block around it.
    """

    def __init__(self, installation: "Installation", plan: Plan | None = None, layout: VisionLayout | None = None):
        self.installation: Installation | None = installation
        self.plan, self.layout = plan, layout
        self.outer = _open(_INNERMOST.get())
        _INNERMOST.set(self)

    def close(self) -> None:
        """Leave the block; what is in force is again what was around it. In any order and from any thread."""
        installation = self.installation
        if installation is not None and self.layout is None:
            installation.close_block(self)
        self.installation = self.plan = self.layout = None
        _INNERMOST.set(_open(_INNERMOST.get()))


_INNERMOST: ContextVar[Block | None] = ContextVar("fastmmoe_block", default=None)


def _open(block: Block | None) -> Block | None:
    """A block, or the first one around it that has not been left."""
    while block is not None and block.installation is None:
        block = block.outer
    return block


def innermost_block(installation: "Installation", with_layout: bool = False) -> Block | None:
    """The innermost block of this thread or task on a model: of those that say what is in force, or give a layout."""
    block = _INNERMOST.get()
    while block is not None and (block.installation is not installation or (block.layout is not None) != with_layout):
        block = block.outer
    return block
