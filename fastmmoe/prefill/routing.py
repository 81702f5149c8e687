"""A gate that gives tokens fewer experts (method section 1), and the experts that run on its choice."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastmmoe.families import Family
from fastmmoe.prefill.expert_form import expert_form
from fastmmoe.prefill.experts import NAME, run_pairs
from fastmmoe.prefill.patch import Patch, innermost, patch_in
from fastmmoe.prefill.place import Place
from fastmmoe.prefill.running import RUNNING
from fastmmoe.prefill.sequence import ForwardPass
from fastmmoe.prefill.sharding import work_group
from fastmmoe_kernels import choose_experts, gate_routing, topk_routing


class GatePatch(Patch):
    """Chooses experts: fewer than the model does, none for padding."""

    __slots__ = ("_is_known",)
    part = "gate"
    as_method = True

    def prepare(self) -> None:
        # of the family's class, whatever loads or adapts its weight
        name = type(self.module).__name__.removeprefix("Parametrized")
        self._is_known = self.is_bare and name == self.installation.family.gate_class

    def __call__(self, hidden: torch.Tensor, *args: Any) -> Any:
        forward = RUNNING.forward
        place = None if forward is None else _reduces_here(forward, self)
        if place is None:
            return self.stock(hidden, *args)
        family, config, gate = self.installation.family, forward.plan.config, self.module
        num_tokens = hidden.shape[:-1].numel()
        if family.vision_only:
            options = dict(vision_mask=hidden.new_ones(num_tokens, dtype=torch.bool))
        elif forward.num_tokens == num_tokens:
            options = forward.token_masks(hidden.device)
        else:
            return self.stock(hidden, *args)  # somebody asks it about other tokens
        options = options | dict(backend=config.backend, **family.routing_options(gate, *args))
        if options["vision_mask"] is not None:
            options["vision_top_k"] = place.choice.vision_top_k
        if not place.skips:
            options.pop("exempt_mask", None)
        else:
            options["skip_below"] = place.skip_below(hidden.device)
        linear = linear_options(gate, hidden, family) if self.is_bare else None
        shares = place.choice.budget is not None and options["vision_mask"] is not None
        own = _own_choice(options)
        if linear is not None:
            flat = hidden.reshape(-1, hidden.shape[-1])
            routing = gate_routing(flat, gate.weight, **linear, **(own if shares else options))
            logits = routing.logits
        else:
            output = self.stock(hidden, *args)
            logits = family.logits(output)
            if not self._is_known:
                self._check_choice(logits, *output[1:3], family.routing_options(gate, *args))
            routing = topk_routing(logits, **(own if shares else options))
        if shares:
            allowed = choose_experts(
                routing.ids, routing.weights, options["vision_mask"],
                num_experts=logits.shape[-1], budget=place.choice.budget, backend=config.backend,
            )  # fmt: skip
            routing = topk_routing(logits, **options, vision_experts=allowed)
        return forward.chose(place, family.gate_output(gate, logits, routing))

    def _check_choice(
        self, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, options: dict[str, Any]
    ) -> None:
        """Refuse a gate whose own choice does not follow from its logits as the family's does. Waits for the device.

        Once: what it does for one batch it does for all.

        Raises:
            RuntimeError: weights [T, K] and ids [T, K] are not those of the logits [T, E].
        """
        routing = topk_routing(logits, **options, backend="torch")
        # in order: of experts that tie, as at padding, another one may be chosen
        chosen = [
            torch.stack((logits.float().gather(1, to.long()).sort(1).values, share.float().sort(1).values))
            for to, share in ((ids, weights), (routing.ids, routing.weights))
        ]
        if not torch.allclose(*chosen, rtol=2e-2, atol=1e-2):
            raise RuntimeError(
                f"model: layer {self.number}'s gate ({type(self.module).__name__}) does not choose experts by its "
                f"logits as {self.installation.family.gate_class} does; fewer experts are not supported with it"
            )
        self._is_known = True


class ExpertsPatch(Patch):
    """Runs the chosen experts, and none in the slots that were left empty.

    Attributes:
        form: under which `moe_experts` computes what they do; None: the model's own run, one row per token and expert.
    """

    __slots__ = ("form", "_is_known", "_has_parts")
    part = "experts"
    as_method = True

    def prepare(self) -> None:
        try:
            self.form = expert_form(self.module, self.installation.family.plain_experts)
        except ValueError:
            self.form = None
        # something else may stand in place of what transformers has
        self._is_known = self.is_bare and (self.form is not None or hasattr(type(self.module).forward, "__wrapped__"))
        self._has_parts = False
        name = f"layer {self.number}'s experts"
        if work_group(self.installation.layer(self.number), self.module, name) is not None:
            self._prepare_split(name)

    def _prepare_split(self, name: str) -> None:
        """Run experts that processes share below what brings them their tokens, and sums up what they make of them.

        Raises:
            ValueError: something else than transformers does.
        """
        distributor = getattr(self._before, "__module__", None) or ""
        if not distributor.startswith("transformers.distributed.") or not hasattr(
            type(self.module).forward, "__wrapped__"
        ):
            raise ValueError(
                f"model: {name} are split between processes by something else than transformers' DistributedConfig; "
                "fewer experts are not supported with it"
            )
        # never compared with a run of their own: other processes may have no vision tokens, and would wait in vain
        self.form, self._is_known = None, True
        self._has_parts = not self.module._is_expert_parallel

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        forward = RUNNING.forward
        place = None if forward is None else _reduces_here(forward, self)
        if place is None:
            return self.stock(hidden, ids, weights)
        place.experts = forward.token
        config, is_chosen = forward.plan.config, forward.chosen_at is place and ids is forward.chosen_ids
        is_flat, pairs = self.installation.family.vision_only, None
        # each number of pairs would be another graph
        is_ours = self._is_known and self.form is not None
        if is_chosen and not (is_ours and torch.compiler.is_compiling()):
            most = place.choice.vision_top_k
            pairs = len(ids) * most if is_flat else forward.active_pairs(ids.shape[1], most)
        if is_ours:
            return self.form.run(self.module, hidden, ids, weights, config.backend, pairs)
        if forward.chosen_at is not place:
            return self.stock(hidden, ids, weights)  # the gate chose for other tokens than the forward's
        num_experts = forward.num_experts
        if not is_chosen:  # by somebody behind the gate, who may have left slots empty
            return self.stock(hidden, ids.clamp_max(num_experts - 1).long(), weights)
        if self._has_parts and self.module.config._experts_implementation == NAME:
            # a process runs its part of every expert by `moe_experts`, which leaves empty slots out
            return self.stock(hidden, ids, weights)
        if self._is_known:
            return run_pairs(self.stock, hidden, ids, weights, num_experts, pairs)
        # once: empty slots have weight 0, and any expert may take them
        want = self.stock(hidden, ids.clamp_max(num_experts - 1).long(), weights)
        if self.form is not None:
            output = self.form.run(self.module, hidden, ids, weights, config.backend, pairs)
            self._is_known = _is_close(output, want)
            if self._is_known:
                return output
            self.form = None
        output = run_pairs(self.stock, hidden, ids, weights, num_experts, pairs)
        self._is_known = _is_close(output, want)
        if not self._is_known:
            raise RuntimeError(
                f"model: the forward of layer {self.number}'s experts ({type(self.module).__name__}) is not the sum of "
                "what each chosen expert makes of a token; fewer experts are not supported with it"
            )
        return output


def _own_choice(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a routing by which all tokens choose as the model does, with bare probabilities for weights."""
    reducing = ("vision_mask", "vision_top_k", "skip_below", "exempt_mask")
    kept = {name: value for name, value in options.items() if name not in reducing}
    return kept | {"norm_topk_prob": False, "routed_scaling_factor": 1.0}


def _is_close(output: torch.Tensor, stock: torch.Tensor) -> bool:
    """Whether experts made the same of a batch in another way. Waits for the device."""
    scale = stock.float().abs().max().item()
    return torch.allclose(output.float(), stock.float(), rtol=2e-2, atol=2e-2 * scale)


def _reduces_here(forward: ForwardPass, patch: Patch) -> Place | None:
    """This layer's place if the forward under way gives its tokens fewer experts here; else None.

    Another plan, which is not this forward's, may have put the patch there.
    """
    if not patch.live or forward.installation is not patch.installation or not forward.reduces:
        return None
    return patch.places.get(forward.plan)


def gate_probs(
    forward: ForwardPass, layer: nn.Module, hidden: torch.Tensor, family: Family, backend: str
) -> torch.Tensor:
    """A layer's gate's probabilities beside its own choice, float32 [B, n, E], for hidden [B, n, H]."""
    gate, args = family.gate_of(layer), family.gate_arguments(family.moe_of(layer))
    inside = innermost(gate)
    flat, options = hidden.reshape(-1, hidden.shape[-1]), family.routing_options(inside, *args)
    patch = patch_in(vars(gate).get("forward"))
    is_bare = inside is gate and ("forward" not in vars(gate) or patch is not None and patch.is_bare)
    linear = linear_options(gate, hidden, family) if is_bare else None
    if linear is not None:
        probs = gate_routing(flat, gate.weight, **linear, **options, return_probs=True, backend=backend).probs
    else:
        forward.probing = True
        try:
            # forward, not __call__: output recorders should not see this extra pass
            logits = family.logits(gate.forward(flat, *args)).float()
        finally:
            forward.probing = False
        probs = logits.softmax(-1) if options["scoring"] == "softmax" else logits.sigmoid()
    return probs.view(*hidden.shape[:-1], -1)


def linear_options(gate: nn.Module, hidden: torch.Tensor, family: Family) -> dict[str, Any] | None:
    """The options of `gate_routing`, beside the weight, that make a gate's logits of hidden; None: no options do.

    It must be the family's own class, with nothing in or around it, no parameters but those that the family tells of,
    and its weight at hand.
    """
    weight = gate._parameters.get("weight")
    if family.linear is None or weight is None or gate._modules or type(gate).__name__ != family.gate_class:
        return None
    if weight.device != hidden.device or weight.dtype != hidden.dtype or isinstance(weight, DTensor):
        return None
    options = family.linear(gate)
    known = (weight, *options.values())
    is_whole = all(other is None or any(other is one for one in known) for other in gate._parameters.values())
    return options if is_whole else None
