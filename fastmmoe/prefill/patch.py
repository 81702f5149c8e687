"""What runs in place of a module's forward, or of one of its attributes, and how it comes off again: by identity.

Others put things on modules too (offloading, adapters, a user's wrapper), in any order. So a patch takes off only what
is still its own; where something else stands on top of it, it stays below and does nothing from then on.
"""

import copy
import inspect
import warnings
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from fastmmoe.prefill.installation import Installation

# offloading wraps a forward and keeps what it wraps under the second name, to run it once the weights are there
FORWARDS = ("forward", "_old_forward")


class Patch:
    """Runs in place of one module's forward. A copy of it is the module's own forward: copies of models are stock.

    Attributes:
        module: whose forward it replaces.
        installation: to which it belongs.
        number: of the decoder layer, None outside of one.
        part: what the module is, for errors.
        live: whether it is on; otherwise it only hands on.
    """

    part = "module"

    def __init__(self, installation: "Installation", module: nn.Module, number: int | None = None):
        self.installation, self.module, self.number = installation, module, number
        self.live = False
        self._before: Any = None  # the instance's own forward, if it had one

    def put(self) -> None:
        """Put it on the module."""
        attributes = vars(self.module)
        # inside of what offloading has wrapped: there the weights are loaded
        name = FORWARDS["_hf_hook" in attributes and "_old_forward" in attributes]
        self._before = attributes.get(name)
        attributes[name] = self
        self.live = True

    def take_off(self) -> None:
        """Take it off, unless something else stands in its place."""
        self.live = False
        attributes = vars(self.module)
        for name in FORWARDS:
            if attributes.get(name) is not self:
                continue
            if name == "forward" and self._before is None:
                del attributes[name]
            else:
                attributes[name] = self._stock_forward(self.module)

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes without this patch."""
        if self._before is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self._before(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def is_there(self) -> bool:
        """Whether it, or something on top of it, stands in place of the forward."""
        return any(name in vars(self.module) for name in FORWARDS)

    @property
    def is_bare(self) -> bool:
        """Whether the class's own forward stands below."""
        return self._before is None or getattr(self._before, "__func__", None) is type(self.module).forward

    @property
    def __signature__(self) -> inspect.Signature:
        # transformers reads off a forward's signature which arguments a model takes
        return inspect.signature(self._stock_forward(self.module))

    def _stock_forward(self, module: nn.Module) -> Any:
        return MethodType(type(module).forward, module) if self._before is None else self._before

    def __deepcopy__(self, memo: dict) -> Any:
        self.copied()
        if self._before is not None:
            return copy.deepcopy(self._before, memo)
        return self._stock_forward(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple:
        self.copied()
        if self._before is not None:
            return _itself, (self._before,)
        return MethodType, (type(self.module).forward, self.module)

    def copied(self) -> None:
        """Called when a copy of the module is made."""


class ComputedConfig:
    """A module's config of which one attribute is asked of a patch; the rest, copies too, is the config's own."""

    def __init__(self, config: Any, name: str, patch: "ConfigPatch"):
        self.__dict__.update(_config=config, _name=name, _patch=patch)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_config"], name)
        return self.__dict__["_patch"].computed(value) if name == self.__dict__["_name"] else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)

    def __copy__(self) -> Any:
        return copy.copy(self.__dict__["_config"])

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self.__dict__["_config"], memo)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _itself, (self.__dict__["_config"],)


class ConfigPatch:
    """Computes one attribute of the config that one module reads.

    Attributes:
        installation, module, number, part, live: as in `Patch`.
        attribute: which.
    """

    part = "config"
    attribute: str

    def __init__(self, installation: "Installation", module: nn.Module, number: int):
        self.installation, self.module, self.number = installation, module, number
        self.live = False

    def put(self) -> None:
        self._config = vars(self.module)["config"]
        self._computed = ComputedConfig(self._config, self.attribute, self)
        vars(self.module)["config"] = self._computed
        self.live = True

    def take_off(self) -> None:
        self.live = False
        if vars(self.module).get("config") is self._computed:
            vars(self.module)["config"] = self._config

    @property
    def is_there(self) -> bool:
        return vars(self.module).get("config") is self._computed

    def computed(self, value: Any) -> Any:
        """The attribute in place of its `value`."""
        raise NotImplementedError


def _itself(value: Any) -> Any:
    return value


def warn_of_copy() -> None:
    warnings.warn(
        "fastmmoe: a copy of an enabled model is a stock model; call fastmmoe.enable on the copy", stacklevel=2
    )


def innermost(module: nn.Module) -> nn.Module:
    """A module without what wraps it and calls it: `torch.compile`, an adapter on its parameters."""
    while True:
        inside = module._modules.get("_orig_mod", module._modules.get("base_layer"))
        if inside is None:
            return module
        module = inside
