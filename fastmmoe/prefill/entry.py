"""Where a call of the model comes in: the head tells who asks, the multimodal model which tokens are vision tokens.

What the thread runs is set here and in `text.py`, and put back at the end, however it ends.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import nn

from fastmmoe.families.family import find_tokens
from fastmmoe.prefill.patch import Patch
from fastmmoe.prefill.running import RUNNING, Call
from fastmmoe.prefill.sequence import ForwardPass

KEEP = "logits_to_keep"
_HOST_READ = "fastmmoe: a prefill reads on the host which of its tokens are vision tokens"


def _in_eager_mode(call: Callable) -> Callable:
    """torch.compile does not trace the call itself, but what is called inside; torch.export is refused."""
    disabled = torch.compiler.disable(call, recursive=False, reason=_HOST_READ)

    @functools.wraps(disabled)  # with the mark that torch.compile goes by
    def checked(self: "EntryPatch", *args: Any, **kwargs: Any) -> Any:
        if self.live and torch.compiler.is_exporting():
            raise RuntimeError(f"{_HOST_READ}, and cannot be exported; call fastmmoe.disable(model) first")
        return disabled(self, *args, **kwargs)

    return checked


class EntryPatch(Patch):
    """On a module through which a call of the model comes in.

    torch.compile does not trace it, nor `begin`, `finish` and `end`: only the module's own forward. A head that knows
    no `logits_to_keep` is lent it, so that `generate` tells how many candidates stand behind the token that asks.
    """

    __slots__ = ("_names", "_is_head", "_lends", "_takes_any")
    level: int  # see `Call.at`

    def prepare(self) -> None:
        parameters = inspect.signature(type(self.module).forward).parameters
        self._names = [name for name in parameters if name != "self"]
        self._takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        self._is_head = is_head(self.module)
        self._lends = self._is_head and KEEP not in self._names

    @property
    def __signature__(self) -> inspect.Signature:
        signature = super().__signature__
        # with nothing in force the stock model runs, which would compute the last logits alone if it handed this on
        if not (self.live and self._lends) or self.installation.plan is None:
            return signature
        others = list(signature.parameters.values())
        place = len(others) - (others[-1].kind is inspect.Parameter.VAR_KEYWORD)
        lent = inspect.Parameter(KEEP, inspect.Parameter.KEYWORD_ONLY, default=0)
        return signature.replace(parameters=[*others[:place], lent, *others[place:]])

    @property
    def __code__(self) -> CodeType:
        # torch.export asks where a forward stands
        return inspect.unwrap(type(self.module).forward).__code__

    @_in_eager_mode
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.live:
            return self.stock(*args, **kwargs)
        outer = RUNNING.call, RUNNING.forward, RUNNING.call and RUNNING.call.at
        try:
            args, kwargs = self.begin(args, kwargs)
            return self.finish(self.stock(*args, **kwargs))
        finally:
            self.end(*outer)

    @torch.compiler.disable
    def begin(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the module's forward, which is called with these arguments, and gets those returned."""
        inputs = dict(zip(self._names, args, strict=False)) | kwargs if args else kwargs
        call, RUNNING.forward = RUNNING.call, None
        if call is None or call.installation is not self.installation or call.at >= self.level:
            plan = self.installation.plan
            call = RUNNING.call = Call(self.installation, plan, inputs.get("inputs_embeds") is not None)
            if plan is not None:
                # what it began with stays on until it ends, whoever switches meanwhile
                self.installation.hold(plan)
                call.held = True
        if call.plan is not None and 0 <= call.at < self.level - 1:
            self.gone_past()
        call.at = call.entered = self.level
        self.enter(call, inputs)
        if self._lends and not self._takes_any:
            kwargs.pop(KEEP, None)
        return args, kwargs

    def enter(self, call: Call, inputs: dict[str, Any]) -> None:
        """What the call under way learns here."""
        raise NotImplementedError

    @torch.compiler.disable
    def finish(self, output: Any) -> Any:
        """After the module's forward."""
        call = RUNNING.call
        if call.plan is not None and call.entered == self.level:
            self.nothing_inside(call)
        return output

    def nothing_inside(self, call: Call) -> None:
        """The module's forward did not call the next one that ours is on.

        Raises:
            RuntimeError: it should have.
        """

    @staticmethod
    def gone_past() -> None:
        """Refuse a head that does not go through the multimodal model's forward as it was enabled."""
        raise RuntimeError(
            "fastmmoe: no effect: the head did not call the multimodal model as it was enabled; enable it again"
        )

    @torch.compiler.disable
    def end(self, call: Call | None, forward: ForwardPass | None, at: int | None) -> None:
        """At the end, also in an error: the thread runs again what it ran before."""
        here, RUNNING.call, RUNNING.forward = RUNNING.call, call, forward
        if here is not call:
            if here.held:
                here.held = False
                self.installation.release(here.plan)
        elif call is not None:
            call.at = at


class HeadPatch(EntryPatch):
    """On the model with the language head."""

    __slots__ = ()
    level = 0

    def enter(self, call: Call, inputs: dict[str, Any]) -> None:
        call.back = _tokens_behind(inputs)

    def nothing_inside(self, call: Call) -> None:
        self.gone_past()


class ParentPatch(EntryPatch):
    """On the multimodal model."""

    __slots__ = ()
    level = 1

    def enter(self, call: Call, inputs: dict[str, Any]) -> None:
        installation = self.installation
        call.vision = None
        call.special = special_tokens(call, self.module, inputs)
        if self._is_head:
            call.back = _tokens_behind(inputs)  # its own
        if installation.layout is None:
            call.vision = installation.family.find_vision(self.module, inputs)
        if call.vision is not None and installation.blocks_open and not installation.in_block:
            _warn_of_other_blocks()

    def nothing_inside(self, call: Call) -> None:
        if call.vision is not None:
            raise RuntimeError("fastmmoe: no effect: a forward with vision tokens did not call the text model's module")

    @torch.compiler.disable
    def end(self, call: Call | None, forward: ForwardPass | None, at: int | None) -> None:
        if RUNNING.call is not None:
            RUNNING.call.vision = RUNNING.call.special = None
        super().end(call, forward, at)


def special_tokens(call: Call, module: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
    """Where a forward's tokens stand that are neither text nor vision, bool [B, n]; None: nobody asks."""
    if call.plan is None or not call.plan.config.special_tokens:
        return None
    return find_tokens(module, inputs, call.plan.config.special_tokens)


def is_head(module: nn.Module) -> bool:
    """Whether a module's forward makes logits, of which `generate` reads the last ones."""
    forward = getattr(type(module), "forward", None)  # a scripted module has none that could be asked
    if not inspect.isfunction(forward) or forward is nn.Module.forward:
        return False
    # of its class: a wrapper may hand on what it does not know itself
    can_generate = hasattr(type(module), "can_generate") and module.can_generate()
    return can_generate or KEEP in inspect.signature(forward).parameters


def _tokens_behind(inputs: dict[str, Any]) -> int:
    """How many candidates or answers, whose logits are wanted too, stand behind the prompt's last token, which asks."""
    keep = inputs.get(KEEP)
    return keep - 1 if isinstance(keep, int) and keep > 1 else 0


def _warn_of_other_blocks() -> None:
    warnings.warn(
        "fastmmoe: this thread or task is in no `enabled` block and runs what `enable` made of the model, while a "
        "block of another one is open; what is started in a block does not inherit it "
        "(contextvars.copy_context().run does)",
        stacklevel=4,
    )
