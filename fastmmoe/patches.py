"""What is put on a model's modules, and how all of it comes off again."""

from collections.abc import Callable
from typing import Any

from torch import nn


class Patches:
    """Forward hooks and instance attributes on modules that stay otherwise as they are."""

    def __init__(self):
        self._undo: list[Callable[[], None]] = []

    def before(self, module: nn.Module, hook: Callable) -> None:
        """Run `hook(module, args, kwargs)` before the module's forward."""
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)

    def after(self, module: nn.Module, hook: Callable, always_call: bool = False) -> None:
        """Run `hook(module, args, kwargs, output)` after the module's forward."""
        self._undo.append(module.register_forward_hook(hook, with_kwargs=True, always_call=always_call).remove)

    def put(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of the instance, in front of its class's."""
        attributes = module.__dict__
        if name in attributes:
            before = attributes[name]
            self._undo.append(lambda: attributes.__setitem__(name, before))
        else:
            self._undo.append(lambda: attributes.pop(name))
        attributes[name] = value

    def remove(self) -> None:
        """Take every trace off, the last one first."""
        while self._undo:
            self._undo.pop()()
