"""Hooks that run FastMMoE inside a stock transformers model.

A forward with vision tokens passes, in this order: the head (which token asks), the multimodal model (which tokens are
vision tokens), the text model (the host-side plan), then per decoder layer the mask and RoPE of what is left, and at
a prune layer the hooks of `PruneLayer`. Behind the last layer the sequence gets its length back.

Gates, experts and layers have their `forward` replaced, on the instance, by one that calls their own: a hook cannot
keep a module from running, and costs five times as much where there is nothing to do, in every layer of every decode
step.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastmmoe import experts
from fastmmoe.adapters import find_text_model
from fastmmoe.config import ReductionConfig
from fastmmoe.gates import is_linear
from fastmmoe.packing import read_packed_layout
from fastmmoe.patches import Patches
from fastmmoe.prefill import CACHE_STATE, NO_EFFECT, CacheState, ForwardPass, Segment, ThreadState
from fastmmoe.prune_layer import PruneLayer
from fastmmoe_kernels import VisionLayout, gate_routing, topk_routing
from fastmmoe_kernels.backend import resolve_backend


class Hooks:
    """FastMMoE on one model: checks on construction, `install` and `remove`.

    Attributes:
        config: what to reduce.
        text_config: the text model's config.
        last: segments of the last forward with vision tokens, for the report; None before one.
        skipped: the last forward with vision tokens had fewer than `config.min_vision_tokens`.
    """

    def __init__(self, model: nn.Module, config: ReductionConfig):
        if model.training:
            raise ValueError("model: expected a model in evaluation mode, got one in training mode; call model.eval()")
        self.adapter, self._text, self._parent = find_text_model(model)
        self.config = config
        self.text_config = self._text.config
        self.last: list[Segment] | None = None
        self.skipped = False
        self._heads = [m for m in model.modules() if _takes_logits_to_keep(m) and self._text in m.modules()]
        self._layers = list(self._text.layers)
        self._local = ThreadState()
        self._patches = Patches()
        self._check(model)
        self._pruning = config.pruning()
        self._stages = {
            number: PruneLayer(stage, self._layers[number], self.adapter, self._pruning, self._local)
            for stage, number in enumerate(config.prune_layers)
        }

    def _check(self, model: nn.Module) -> None:
        """Refuse what would fail, or silently do nothing, in a forward."""
        adapter, config = self.adapter, self.config
        resolve_backend(config.backend, next(model.parameters()))
        if getattr(self.text_config, "sliding_window", None) is not None:
            raise ValueError(
                f"model: sliding window attention (sliding_window={self.text_config.sliding_window}) is not supported"
            )
        moe = [i for i, layer in enumerate(self._layers) if adapter.is_moe(layer)]
        if not moe:
            raise ValueError("model: no layer holds routed experts")
        for layer in config.prune_layers:
            if layer < len(self._layers) and layer not in moe and not config.prunes_behind_layer:
                raise ValueError(f"prune_layers: layer {layer} is not a MoE layer")
        top_k = adapter.routing_options(adapter.gate_of(self._layers[moe[0]]))["top_k"]
        config.check_model(len(self._layers), top_k)
        self._reduced: list[int] = []
        if config.vision_top_k is not None and config.vision_top_k < top_k:
            self._reduced = [i for i in moe if i >= config.reduction_layer]
            if not self._reduced:
                raise ValueError(f"reduction_layer: no MoE layer from layer {config.reduction_layer} on")
        for i in self._reduced:
            module = adapter.experts_of(self._layers[i])
            experts.check_experts(module)
            if getattr(module, "_is_expert_parallel", False):
                raise ValueError("model: expert parallelism is not supported together with vision_top_k")

    # ---------------------------------------------------------------- installation

    def install(self) -> None:
        """Register all hooks; on an error none stays behind."""
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        adapter, patches = self.adapter, self._patches
        for head in self._heads:
            patches.before(head, _bound(head, self._before_head))
        patches.before(self._parent, _bound(self._parent, self._before_parent))
        patches.after(self._parent, self._after_parent)
        patches.after(self._parent, self._clear_vision, always_call=True)
        patches.before(self._text, _bound(self._text, self._before_text))
        patches.after(self._text, self._after_text)
        patches.after(self._text, self._clear_pass, always_call=True)

        first = min(self._stages, default=len(self._layers))
        for number, layer in enumerate(self._layers):
            if number >= first:
                self._replace_forward(layer, functools.partial(self._layer_forward, number))
            if number in self._stages:
                self._stages[number].install(patches)
            if number in self._reduced:
                self._replace_forward(adapter.gate_of(layer), self._gate_forward)
                self._replace_forward(adapter.experts_of(layer), self._experts_forward)
        patches.after(self._layers[-1], self._after_last_layer)

    def _replace_forward(self, module: nn.Module, forward: Callable) -> None:
        """Let `forward(module, stock, *args)` run in place of a module's own forward, which is `stock`."""
        # accelerate's offloading wraps a forward: ours has to run inside, where the weights are loaded
        name = "_old_forward" if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward") else "forward"
        self._patches.put(module, name, functools.partial(forward, module, getattr(module, name)))

    def remove(self) -> None:
        """Take every trace of the hooks off the model."""
        self._patches.remove()

    # ---------------------------------------------------------------- what a forward is

    @contextmanager
    def fixed_layout(self, layout: VisionLayout) -> Iterator[None]:
        """Within the `with` block, every forward of this thread is a prefill with this layout; no mask is read."""
        device = next(self._text.parameters()).device
        if device.type != "meta":  # once, and not in every forward
            layout = layout.to(device)
        before, self._local.fixed_layout = self._local.fixed_layout, layout
        try:
            yield
        finally:
            self._local.fixed_layout = before

    @property
    def _pass(self) -> ForwardPass | None:
        return self._local.forward_pass

    def _before_head(self, module: nn.Module, inputs: dict[str, Any]) -> None:
        keep = inputs.get("logits_to_keep")
        # the prompt's last token asks, not the candidates or answers behind it whose logits are wanted as well
        self._local.back = keep - 1 if isinstance(keep, int) and keep > 1 else 0

    def _before_parent(self, module: nn.Module, inputs: dict[str, Any]) -> None:
        self._local.vision = None
        if self._local.fixed_layout is None:
            self._local.vision = self.adapter.vision_mask(module, inputs)

    def _after_parent(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._local.vision is not None:
            raise RuntimeError("fastmmoe: no effect: a forward with vision tokens did not call the text model's module")

    def _clear_vision(self, *_: Any) -> None:
        self._local.vision = None
        self._local.back = 0

    def _before_text(self, module: nn.Module, inputs: dict[str, Any]) -> None:
        local = self._local
        local.forward_pass = None
        vision, local.vision = local.vision, None
        cache = inputs.get("past_key_values")
        state = getattr(cache, CACHE_STATE, None)
        if vision is None and local.fixed_layout is None and state is None:
            return
        self._check_inputs(module, inputs)
        if inputs.get("cu_seq_lens_q") is not None:
            self._begin_packed(inputs, vision)
            return
        if local.fixed_layout is not None:
            self._begin_fixed(inputs, cache, state)
            return
        batch, n, device = self._shape(inputs)
        past = _cached_tokens(cache, state, n)
        if past == 0:
            state = None
        elif state is not None:
            if state.prefixes[0][0].shape[0] != batch:
                raise RuntimeError(
                    f"past_key_values: holds pruned vision tokens of {state.prefixes[0][0].shape[0]} samples, "
                    f"got a batch of {batch}"
                )
            if past < state.length:
                state.crop_to(past)
        mask = inputs.get("attention_mask")
        new_mask, old_mask = _new_tokens_mask(mask, past, n)
        layout = None
        if vision is not None:
            layout = VisionLayout.from_mask(vision, None if new_mask is None else new_mask.to(vision.device))
            if self._skips(layout):
                layout = None
        if layout is not None and (any(layout.n_vision) or state is not None):
            self._begin(inputs, layout, cache, past, state, old_mask)
        elif state is not None:
            valid = torch.ones(batch, n, dtype=torch.bool, device=device) if new_mask is None else new_mask.bool()
            # one token per sample is a decode step; it would not be decoded if it were padding
            segment = Segment(valid, n == 1 or new_mask is None)
            local.forward_pass = ForwardPass(self.text_config, [segment], cache, past, state, old_mask)

    def _skips(self, layout: VisionLayout) -> bool:
        """Whether a forward has too few vision tokens to gain anything; the report is told."""
        if not 0 < sum(layout.n_vision) < self.config.min_vision_tokens:
            return False
        self.last, self.skipped = [Segment.from_layout(layout)], True
        return True

    def _begin_packed(self, inputs: dict[str, Any], vision: torch.Tensor | None) -> None:
        """A forward over one row of samples, see `fastmmoe.pack_batch`."""
        if self._local.fixed_layout is not None:
            raise ValueError("cu_seq_lens_q: packed batches are not supported within fixed_layout")
        if inputs.get("past_key_values") is not None or inputs.get("use_cache") is not False:
            raise ValueError("use_cache: expected False and no cache with cu_seq_lens_q: nothing is decoded from a row")
        if inputs.get("attention_mask") is not None:
            raise ValueError("attention_mask: expected None with cu_seq_lens_q, got one")
        layout = read_packed_layout(vision, inputs["cu_seq_lens_q"])
        if any(layout.n_vision) and not self._skips(layout):
            self._begin(inputs, layout, None, 0, None, None, packed=True)

    def _begin_fixed(self, inputs: dict[str, Any], cache: Any, state: CacheState | None) -> None:
        """A forward on an empty cache whose layout is known: nothing is read from the device."""
        layout = self._local.fixed_layout
        batch, n, device = self._shape(inputs)
        if (batch, n) != (layout.batch_size, layout.width):
            raise ValueError(
                f"layout: expected forwards with {layout.batch_size} samples of {layout.width} tokens within "
                f"fixed_layout, got {batch} of {n}"
            )
        if state is not None:
            raise ValueError("past_key_values: expected an empty cache within fixed_layout, got one of a prefill")
        if not layout.is_full and inputs.get("attention_mask") is None:
            raise ValueError("attention_mask: expected one for a layout with padding, got None")
        if any(layout.n_vision):
            self._begin(inputs, layout.to(device), cache, 0, None, None)

    def _begin(
        self,
        inputs: dict[str, Any],
        layout: VisionLayout,
        cache: Any,
        past: int,
        state: CacheState | None,
        old_mask: torch.Tensor | None,
        packed: bool = False,
    ) -> None:
        """Start a forward with vision tokens."""
        self._check_prompt_ends(layout)
        # of a row, the last logits are those of its last sample: no candidates
        back = self._local.back if self._local.back < min(layout.tails) and not packed else 0
        segment = Segment.from_layout(layout, packed)
        current = ForwardPass(self.text_config, [segment], cache, past, state, old_mask, back)

        def embeddings() -> torch.Tensor:
            row = self._embeddings(inputs)
            return segment.packing.pad(row) if packed else row

        if self._stages:
            current.prompt = self._pruning.read_prompt(embeddings, layout, back)
        self._local.forward_pass = current

    def _embeddings(self, inputs: dict[str, Any]) -> torch.Tensor:
        embeds = inputs.get("inputs_embeds")
        return self._text.get_input_embeddings()(inputs["input_ids"]) if embeds is None else embeds

    def _check_inputs(self, module: nn.Module, inputs: dict[str, Any]) -> None:
        """Refuse a forward that FastMMoE cannot take part in."""
        if module.training:
            raise RuntimeError(
                "model: expected evaluation mode, got training mode; fastmmoe.disable(model) to train it"
            )
        if inputs.get("output_router_logits") or getattr(self.text_config, "output_router_logits", False):
            raise ValueError("output_router_logits: not supported while FastMMoE is enabled, got True")

    def _check_prompt_ends(self, layout: VisionLayout) -> None:
        """A sample's last token asks for the others and answers: it must not be pruned itself."""
        for sample, (n_vision, tail) in enumerate(zip(layout.n_vision, layout.tails, strict=True)):
            if self._stages and n_vision and not tail:
                raise ValueError(f"input_ids: sample {sample} ends in a vision token, expected text at the end")

    @staticmethod
    def _shape(inputs: dict[str, Any]) -> tuple[int, int, torch.device]:
        """(samples, tokens per sample, device) of a text model's forward."""
        embeds = inputs.get("inputs_embeds")
        tokens = inputs["input_ids"] if embeds is None else embeds
        return tokens.shape[0], tokens.shape[1], tokens.device

    def _after_text(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        current = self._pass
        if current is None or not current.has_vision:
            return
        stages, reduced = len(current.segments) - 1, current.reduced_layers
        if stages != len(self._stages) or reduced != len(self._reduced):
            done = f"{stages} of {len(self._stages)} prune layers and {reduced} of {len(self._reduced)} expert layers"
            raise RuntimeError(NO_EFFECT.format(done))
        # the report needs no RoPE tables, and they are large; a stage that prunes nothing leaves the same segment
        kept = {id(segment): dataclasses.replace(segment, rope=None) for segment in current.segments}
        self.last, self.skipped = [kept[id(segment)] for segment in current.segments], False

    def _clear_pass(self, *_: Any) -> None:
        self._local.forward_pass = None

    # ---------------------------------------------------------------- layers behind a prune layer

    def _layer_forward(self, number: int, layer: nn.Module, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        current = self._local.forward_pass
        if current is None:
            return stock(*args, **kwargs)
        behind = sum(stage_layer < number for stage_layer in self._stages)
        segment = current.segment(behind)
        if segment.index is not None or current.state is not None:
            # decoding without padding is the stock path
            if current.has_vision or kwargs.get("attention_mask") is not None or not current.is_full(behind):
                hidden = args[0] if args else kwargs["hidden_states"]
                kwargs["attention_mask"] = current.attention_mask_for(behind, number, hidden)
                if segment.index is not None:
                    kwargs["position_embeddings"] = current.rope(behind, hidden.device)
                    # gaps in position ids look like packed sequences to flash attention, and RoPE is applied already
                    kwargs["position_ids"] = None
                if segment.packing is not None:
                    bounds, longest = segment.packing.bounds, max(segment.layout.lengths)
                    kwargs |= dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
                    kwargs |= dict(max_length_q=longest, max_length_k=longest)
        if number in self._stages and current.has_vision:
            self._stages[number].enter(current, kwargs)
        return stock(*args, **kwargs)

    def _after_last_layer(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        current = self._pass
        if current is None:
            return None
        current.remember()
        if not current.has_vision or current.segments[-1].index is None:
            return None
        if isinstance(output, tuple):
            return current.restore_length(output[0]), *output[1:]
        return current.restore_length(output)

    # ---------------------------------------------------------------- fewer experts for vision tokens

    def _reduces(self) -> ForwardPass | None:
        current = self._local.forward_pass
        return current if current is not None and current.has_vision else None

    def _gate_forward(self, gate: nn.Module, stock: Callable, hidden: torch.Tensor) -> tuple:
        current = self._reduces()
        if current is None:
            return stock(hidden)
        vision, padding = current.token_masks(hidden.device)
        options = dict(
            vision_mask=vision,
            vision_top_k=self.config.vision_top_k,
            padding_mask=padding,
            backend=self.config.backend,
            **self.adapter.routing_options(gate),
        )
        current.reduced_layers += 1
        if is_linear(gate, hidden):
            routing = gate_routing(hidden.reshape(-1, hidden.shape[-1]), gate.weight, **options)
            return self.adapter.gate_output(routing.logits, routing)
        logits = stock(hidden)[0]
        return self.adapter.gate_output(logits, topk_routing(logits, **options))

    def _experts_forward(
        self, module: nn.Module, stock: Callable, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        if self._reduces() is None:
            return stock(hidden, ids, weights)
        return experts.run_experts(module, hidden, ids, weights, self.config.backend)


def _takes_logits_to_keep(module: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(type(module).forward).parameters


def _bound(module: nn.Module, hook: Callable[[nn.Module, dict[str, Any]], None]) -> Callable:
    """A pre-hook that gets its module's arguments by name; the signature is read once."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]

    def pre_hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        hook(module, {**dict(zip(names, args, strict=False)), **kwargs})

    return pre_hook


def _cached_tokens(cache: Any, state: CacheState | None, new: int) -> int:
    """Tokens of the full sequence in the cache; layer 0 always holds all of them."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    # a static cache counts on the device: do not wait for it in every decode step
    if isinstance(length, torch.Tensor) and state is not None and new == 1:
        return state.seen
    return int(length)


def _new_tokens_mask(
    mask: torch.Tensor | dict | None, past: int, new: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(validity of the new tokens [B, new], the 2D mask over past and new tokens), each None when all are valid."""
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None:
        return None, None
    if mask.dim() == 2:
        return mask[:, -new:], mask
    # a 4D mask, prepared for a static cache: what the last token may attend to is valid
    row = mask[:, 0, -1, past : past + new]
    return (row if row.dtype == torch.bool else row == 0), None
