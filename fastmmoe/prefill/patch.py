"""What runs in place of a module's forward, or of one of its attributes, and how it comes off again: by identity.

Others put things on modules too (offloading, adapters, a user's wrapper), in any order. So a patch takes off only what
is still its own; where something else stands on top of it, it stays below and does nothing from then on.
"""

import copy
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType, MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from fastmmoe.prefill.installation import Installation
    from fastmmoe.prefill.place import Place
    from fastmmoe.prefill.plan import Plan

# offloading wraps a forward and keeps what it wraps under the second name, to run it once the weights are there
FORWARDS = ("forward", "_old_forward")
REDUCE = "__reduce_ex__"


class Patch:
    """Runs in place of one module's forward. Copies of the module, by deepcopy or pickle, do not have it.

    Attributes:
        module: whose forward it replaces; None: it is gone.
        installation: to which it belongs.
        number: of the decoder layer, None outside of one.
        part: what the module is, for errors.
        live: whether it is on; otherwise it only hands on.
        places: what each plan that needs the patch does at its layer. Behind the module's call, ask this and not
            `number`: torch.compile makes one graph of all layers that have equal places, and one for each number.
        as_method: whether a method of the patch stands in place of the forward, not the patch itself: of a method
            torch.compile asks which function it is, of an object which object. A method has no signature of its own.
    """

    # no __dict__: functools.update_wrapper, which offloading calls on a forward, would copy it
    __slots__ = ("installation", "number", "live", "places", "_module", "_placed", "_before", "_reduce")
    part = "module"
    as_method = False

    def __init__(self, installation: "Installation", module: nn.Module, number: int | None = None):
        self.installation, self.number = installation, number
        # the module has the patch: the other way round it would be freed by the cycle collector alone
        self._module = weakref.ref(module)
        self.live = False
        self.places: Mapping[Plan, Place] = MappingProxyType({})
        self._placed: Callable | None = None
        self._before: Callable | None = None  # the instance's own forward, if it had one
        self._reduce: Callable | None = None

    def put(self) -> None:
        """Put it on the module."""
        attributes = vars(self.module)
        # inside of what offloading has wrapped: there the weights are loaded
        name = FORWARDS["_hf_hook" in attributes and "_old_forward" in attributes]
        self._before = attributes.get(name)
        self.prepare()  # from the next line on another thread may call it
        self._placed = attributes[name] = MethodType(_call, self) if self.as_method else self
        # copy and pickle ask the instance for it, before its class
        self._reduce = attributes[REDUCE] = _StockReduce(self)
        self.live = True

    @property
    def module(self) -> nn.Module | None:
        return self._module()

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes without this patch."""
        if self._before is not None:
            return self._before(*args, **kwargs)
        module = self.module
        if module is None:
            raise ReferenceError("fastmmoe: the model of this forward is gone; keep the model, not its forward alone")
        return type(module).forward(module, *args, **kwargs)

    @property
    def _stock(self) -> Callable:
        """The forward that `stock` calls."""
        return self._before or own_forward(self.module)

    def prepare(self) -> None:
        """Read off the module what the patch must know."""

    def take_off(self) -> None:
        """Take it off, unless something else stands in its place."""
        self.live = False
        module = self.module
        if module is None:
            return
        attributes = vars(module)
        attributes.update(self._without_it(attributes))
        if attributes.get("forward") is self._placed:
            del attributes["forward"]
        if attributes.get(REDUCE) is self._reduce:
            del attributes[REDUCE]
        self._reduce = None  # no cycle stays

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def is_there(self) -> bool:
        """Whether it, or something on top of it, stands in place of the forward."""
        return any(name in vars(self.module) for name in FORWARDS)

    @property
    def is_on_top(self) -> bool:
        """Whether nothing else stands on top of it, but for offloading."""
        return any(vars(self.module).get(name) is self._placed for name in FORWARDS)

    @property
    def is_bare(self) -> bool:
        """Whether the class's own forward stands below."""
        before = patch_in(self._before)  # one that is off
        if before is not None:
            return before.is_bare
        return self._before is None or getattr(self._before, "__func__", None) is type(self.module).forward

    @property
    def __signature__(self) -> inspect.Signature:
        # transformers reads off a forward's signature which arguments a model takes
        return inspect.signature(self._stock)

    def _without_it(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """What stands in the places of this patch when it is gone, where something does."""
        places = [name for name in FORWARDS if attributes.get(name) is self._placed]
        # what offloading has wrapped has to be there
        return {name: self._stock for name in places if name != "forward" or self._before is not None}

    def stock_attributes(self) -> dict[str, Any]:
        """The module's attributes as they are without this patch."""
        attributes = dict(vars(self.module))
        attributes.update(self._without_it(attributes))
        attributes["_forward_hooks"] = _without_ours(attributes["_forward_hooks"])
        ours = self._placed, self._reduce
        return {name: value for name, value in attributes.items() if all(value is not one for one in ours)}

    def copied(self) -> None:
        """Called when a copy of the module is made."""

    # of a reference to the patch itself that others keep

    def __deepcopy__(self, memo: dict) -> Callable:
        if self._before is not None:
            return copy.deepcopy(self._before, memo)
        return own_forward(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple:
        return (own_forward, (self.module,)) if self._before is None else (_itself, (self._before,))


def _call(patch: Callable, *args: Any, **kwargs: Any) -> Any:
    return patch(*args, **kwargs)


# pickled, a method is its object's attribute of this name: the stock forward, which the patch is pickled as, has one
_call.__name__ = "__call__"


def patch_in(forward: Any) -> Patch | None:
    """The patch that stands in place of a forward, by itself or by a method."""
    forward = getattr(forward, "__self__", forward)
    return forward if isinstance(forward, Patch) else None


class HookPatch:
    """Runs behind one module's forward and behind every other hook on it: what it gets is what the module makes.

    Attributes:
        installation, module, number, part, live: as in `Patch`.
    """

    __slots__ = ("installation", "number", "live", "_module", "_handle", "_reduce")
    part = "module"

    def __init__(self, installation: "Installation", module: nn.Module, number: int):
        self.installation, self.number, self._module = installation, number, weakref.ref(module)
        self.live = False

    @property
    def module(self) -> nn.Module | None:
        return self._module()

    def put(self) -> None:
        self._handle = self.module.register_forward_hook(self)
        self._reduce = vars(self.module)[REDUCE] = _StockReduce(self)
        self.live = True

    def take_off(self) -> None:
        self.live = False
        self._handle.remove()
        module = self.module
        if module is not None and vars(module).get(REDUCE) is self._reduce:
            del vars(module)[REDUCE]
        self._reduce = None

    @property
    def is_there(self) -> bool:
        """Whether it is on the module; it goes behind the hooks that have come since."""
        hooks = self.module._forward_hooks
        if self._handle.id not in hooks:
            return False
        hooks.move_to_end(self._handle.id)
        return True

    @property
    def is_on_top(self) -> bool:
        return self.is_there

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        raise NotImplementedError

    def stock_attributes(self) -> dict[str, Any]:
        """The module's attributes as they are without this hook."""
        attributes = {name: value for name, value in vars(self.module).items() if value is not self._reduce}
        attributes["_forward_hooks"] = _without_ours(attributes["_forward_hooks"])
        return attributes

    def copied(self) -> None:
        """Called when a copy of the module is made."""


def _without_ours(hooks: OrderedDict) -> OrderedDict:
    """A module's hooks, but for those of patches: a module may carry one beside another patch."""
    return OrderedDict((key, hook) for key, hook in hooks.items() if not isinstance(hook, HookPatch))


class _StockReduce:
    """Lets a patched module be copied, by deepcopy or pickle, as what it is without the patch."""

    __slots__ = ("patch",)

    def __init__(self, patch: Patch | HookPatch):
        self.patch = patch

    def __call__(self, protocol: int) -> tuple:
        module = self.patch.module
        self.patch.copied()
        function, args, state, *others = type(module).__reduce_ex__(module, protocol)
        return function, args, self.patch.stock_attributes() if isinstance(state, dict) else state, *others


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
        self.installation, self.number, self._module = installation, number, weakref.ref(module)
        self.live = False

    @property
    def module(self) -> nn.Module | None:
        return self._module()

    def put(self) -> None:
        if "config" not in vars(self.module):
            raise ValueError(
                f"model: layer {self.number}'s {self.part} ({type(self.module).__name__}) has no config of its own to "
                "ask; expected transformers' attention module"
            )
        self._config = vars(self.module)["config"]
        self._computed = ComputedConfig(self._config, self.attribute, self)
        vars(self.module)["config"] = self._computed
        self.live = True

    def take_off(self) -> None:
        self.live = False
        module = self.module
        if module is not None and vars(module).get("config") is self._computed:
            vars(module)["config"] = self._config
        self._computed = None  # no cycle stays

    @property
    def is_there(self) -> bool:
        config = vars(self.module).get("config")
        while isinstance(config, ComputedConfig):
            if config is self._computed:
                return True
            config = vars(config)["_config"]  # of another installation that shares the module
        return False

    @property
    def is_on_top(self) -> bool:
        return self.is_there

    def computed(self, value: Any) -> Any:
        """The attribute in place of its `value`."""
        raise NotImplementedError


AnyPatch = Patch | HookPatch | ConfigPatch


def patches_on(module: nn.Module) -> list[AnyPatch]:
    """The patches whose traces a module carries, and that are on."""
    attributes = vars(module)
    found = [patch_in(attributes.get(name)) for name in FORWARDS]
    found += [getattr(attributes.get(REDUCE), "patch", None), attributes.get("config")]
    found = [vars(trace)["_patch"] if isinstance(trace, ComputedConfig) else trace for trace in found]
    return [patch for patch in found if isinstance(patch, AnyPatch) and patch.live]


def own_forward(module: nn.Module) -> Callable:
    """A module's forward by its class."""
    return MethodType(type(module).forward, module)


def _itself(value: Any) -> Any:
    return value


def innermost(module: nn.Module) -> nn.Module:
    """A module without what wraps it and calls it: `torch.compile`, an adapter on its parameters."""
    while True:
        inside = module._modules.get("_orig_mod", module._modules.get("base_layer"))
        if inside is None:
            return module
        module = inside
