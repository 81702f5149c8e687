"""FastMMoE on one text model: a single installation, however it was reached, and what is in force for whom.

`enable` makes a plan the model's own. `enabled` opens a block, which counts for the thread or task that entered it, as
torch's own context managers do. A module is patched as long as somebody needs it: the model's own plan, an open block,
or a forward under way, which ends under the plan it began with.
"""

import threading
import weakref
from collections.abc import Iterator
from weakref import WeakValueDictionary

from torch import nn

from fastmmoe.families import Family, find_text_model, text_models
from fastmmoe.prefill.attention import AttentionPatch
from fastmmoe.prefill.block import Block, innermost_block
from fastmmoe.prefill.entry import HeadPatch, ParentPatch, is_head
from fastmmoe.prefill.layer import LayerPatch
from fastmmoe.prefill.patch import ConfigPatch, Patch, innermost, patches_on
from fastmmoe.prefill.place import Place
from fastmmoe.prefill.plan import Plan
from fastmmoe.prefill.routing import ExpertsPatch, GatePatch
from fastmmoe.prefill.stage import MoEArgumentsPatch, MoEPatch, NormPatch
from fastmmoe.prefill.text import TextPatch
from fastmmoe_kernels import VisionLayout

# by id of the text model, for as long as a patch, a block or a call refers to it: switching is never a second one
_ALL: WeakValueDictionary[int, "Installation"] = WeakValueDictionary()
_ALL_LOCK = threading.Lock()


class Installation:
    """What is put on one model, by whom it is held, and what is in force.

    Attributes:
        family: the model's.
        own: the plan that `enable` made the model's own; None: stock.
        blocks_open: how many `enabled` blocks are open, in any thread.
    """

    def __init__(self, family: Family, text: nn.Module, parent: nn.Module):
        self.family = family
        # all of them belong to the model, which has the patches, which have this
        self._text, self._parent = weakref.ref(text), weakref.ref(parent)
        self._layers = [weakref.ref(innermost(layer)) for layer in text.layers]
        self.own: Plan | None = None
        self.blocks_open = 0
        self._heads: list[weakref.ref[nn.Module]] = []
        self._held: dict[Plan | None, int] = {}
        self._patches: dict[tuple[type, int], Patch | ConfigPatch] = {}
        self._lock = threading.RLock()

    # ---------------------------------------------------------------- what it is on

    @property
    def text(self) -> nn.Module | None:
        """The text model; None: it is gone."""
        return self._text()

    @property
    def parent(self) -> nn.Module | None:
        """The multimodal model that calls it."""
        return self._parent()

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def layer(self, number: int) -> nn.Module | None:
        """A decoder layer, as it was when the installation last saw the model."""
        return self._layers[number]()

    # ---------------------------------------------------------------- what is in force

    @property
    def plan(self) -> Plan | None:
        """What is in force for this thread or task."""
        block = innermost_block(self)
        return self.own if block is None else block.plan

    @property
    def in_block(self) -> bool:
        """Whether this thread or task is in an `enabled` block on the model."""
        return innermost_block(self) is not None

    @property
    def layout(self) -> VisionLayout | None:
        """What every forward of this thread or task looks like, if it has been said."""
        block = innermost_block(self, with_layout=True)
        return None if block is None else block.layout

    def set_plan(self, plan: Plan | None) -> None:
        """Put a plan, or the stock model, in force: in this thread's innermost `enabled` block, else for the model."""
        with self._lock:
            block = innermost_block(self)
            if plan is not None or block is not None:
                self.hold(plan)
            if block is None:
                before, self.own = self.own, plan
            else:
                before, block.plan = block.plan, plan
            if before is not None or block is not None:
                self.release(before)
            self._update()  # also what an interrupted change has left

    def open_block(self, plan: Plan) -> Block:
        """Enter a block with a plan."""
        with self._lock:
            self.hold(plan)
            self.blocks_open += 1
        return Block(self, plan=plan)

    def close_block(self, block: Block) -> None:
        """Leave a block with a plan, once."""
        with self._lock:
            if block.installation is self:
                block.installation = None
                self.blocks_open -= 1
                self.release(block.plan)

    # ---------------------------------------------------------------- what is patched

    def see(self, model: nn.Module) -> None:
        """Take the modules as they are now, and know the heads above the text model in `model`: they tell who asks."""
        with self._lock:
            self._layers = [weakref.ref(innermost(layer)) for layer in self.text.layers]
            found = (module for module in model.modules() if is_head(module))
            above = [head for head in found if any(inner is self.parent for inner in head.modules())]
            heads = [head for head in map(innermost, above) if head is not self.parent]
            # a wrapper may be one, too: the model's own is the innermost
            heads = [head for head in heads if not any(one in heads for one in head.modules() if one is not head)]
            known = [head() for head in self._heads]
            new = [weakref.ref(head) for head in heads if all(head is not one for one in known)]
            self._heads = self._heads + new  # a new list: forwards read it
            for key, patch in list(self._patches.items()):
                module = patch.module  # held until its patch is looked at
                if module is None or not patch.is_on_top:
                    patch.take_off()
                    del self._patches[key]
            self._update()

    def hold(self, plan: Plan | None) -> None:
        """Keep the modules that a plan needs patched, until `release`: for the stock model, where calls come in."""
        with self._lock:
            self._held[plan] = self._held.get(plan, 0) + 1
            try:
                if self._held[plan] == 1:
                    self._update()
            except BaseException:
                self.release(plan)
                raise

    def release(self, plan: Plan | None) -> None:
        """Let go of a plan; what nobody needs any more comes off."""
        with self._lock:
            self._held[plan] -= 1
            if not self._held[plan]:
                del self._held[plan]
                if not self._held:
                    self._heads = []
                self._update()

    def _update(self) -> None:
        points = [(plan, *point) for plan in self._held for point in self._points(plan)]
        wanted = {(kind, id(module)): (module, number) for _, kind, module, number in points}
        for key, patch in list(self._patches.items()):
            if key not in wanted or wanted[key] != (patch.module, patch.number):
                patch.take_off()
                del self._patches[key]
        for key, (module, number) in wanted.items():
            if key not in self._patches:
                patch = key[0](self, module, number)
                patch.put()
                self._patches[key] = patch
        places: dict[tuple[type, int], dict[Plan, Place]] = {}
        for plan, kind, module, number in points:
            if number is not None and issubclass(kind, Patch):
                places.setdefault((kind, id(module)), {})[plan] = plan.places[number]
        for key, of_plans in places.items():
            self._patches[key].places = of_plans  # a new dict: forwards read the old one

    def _points(self, plan: Plan | None) -> Iterator[tuple[type, nn.Module, int | None]]:
        """What a plan patches: with what, which module, in which layer."""
        family = self.family
        # each asked once: another thread may let go of the model meanwhile
        outside = [(HeadPatch, head()) for head in self._heads] + [(ParentPatch, self.parent), (TextPatch, self.text)]
        yield from ((kind, module, None) for kind, module in outside if module is not None)
        if plan is None:
            return
        for number in range(self.num_layers):
            layer = self.layer(number)
            if layer is None:
                continue  # exchanged, and gone
            if plan.stages and number >= plan.first_stage:
                yield LayerPatch, layer, number
            if number in plan.stages:
                if plan.pruning.looks:
                    yield AttentionPatch, innermost(family.attention_of(layer)), number
                if not plan.config.prunes_behind_layer:
                    yield NormPatch, innermost(family.norm_of(layer)), number
                    yield MoEPatch, innermost(family.moe_of(layer)), number
                    if family.per_token:
                        yield MoEArgumentsPatch, innermost(family.moe_of(layer)), number
            if number in plan.reduced:
                yield GatePatch, innermost(family.gate_of(layer)), number
                yield ExpertsPatch, innermost(family.experts_of(layer)), number

    def own_experts(self, plan: Plan) -> tuple[int, ...]:
        """The layers whose experts a plan does not run by `moe_experts`, which does not know them."""
        patches = (self._patches.get((kind, id(module))) for kind, module, _ in self._points(plan))
        return tuple(p.number for p in patches if isinstance(p, ExpertsPatch) and p.form is None)

    def check(self, plan: Plan) -> None:
        """Refuse to run a plan on modules that are no longer those it was made for.

        Raises:
            RuntimeError: names what was exchanged.
        """
        with self._lock:
            if self.parent is None:
                raise RuntimeError("fastmmoe: no effect: the multimodal model that was enabled is gone")
            layers = [innermost(layer) for layer in self.text.layers]
            if len(layers) != self.num_layers:
                raise RuntimeError(
                    f"fastmmoe: no effect: the model has {len(layers)} layers, and had {self.num_layers} when it was "
                    "enabled; enable it again"
                )
            for number, layer in enumerate(layers):
                if layer is not self.layer(number):
                    self._exchanged(f"layer {number}")
            for kind, module, number in self._points(plan):
                patch = self._patches.get((kind, id(module)))
                if patch is None or patch.module is not module or not patch.is_there:
                    self._exchanged(type(module).__name__ if number is None else f"layer {number}'s {kind.part}")

    @staticmethod
    def _exchanged(what: str) -> None:
        raise RuntimeError(
            f"fastmmoe: no effect: {what} is not what it was when the model was enabled; enable it again"
        )


def _known(text: nn.Module) -> Installation | None:
    found = _ALL.get(id(text))
    # else it is that of a model that is gone, whose place in memory this one has
    return found if found is not None and found.text is text else None


def installation_of(model: nn.Module) -> Installation | None:
    """The installation on a model, found from any module above or at its text model, or one that it patches.

    Raises:
        ValueError: `model` holds several supported models.
    """
    if text_models(model):
        return _known(find_text_model(model)[1])
    for module in model.modules():
        for patch in patches_on(module):
            return patch.installation
    return None


def installation_for(model: nn.Module) -> Installation:
    """The installation on a model, or a new one that holds nothing yet.

    Raises:
        ValueError: no supported model.
    """
    with _ALL_LOCK:
        installation = installation_of(model)
        if installation is None or installation.parent is None:
            found = find_text_model(model)
            if installation is not None:
                installation.set_plan(None)  # its multimodal model is gone
            installation = _known(found[1])
            if installation is None or installation.parent is None:
                installation = _ALL[id(found[1])] = Installation(*found)
        elif any(parent is not installation.parent for _, _, parent in text_models(model)):
            raise ValueError(
                "model: its text model is that of another multimodal model, on which FastMMoE is enabled; disable that "
                "one first"
            )
        for patch in patches_on(installation.parent):
            if patch.installation is not installation:
                # the text model was exchanged
                patch.installation.set_plan(None)
    installation.see(model)
    return installation


def plan_in_force(model: nn.Module) -> Plan | None:
    """What is in force on a model for this thread or task."""
    installation = installation_of(model)
    return None if installation is None else installation.plan
