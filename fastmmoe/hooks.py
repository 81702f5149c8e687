"""Hooks that run FastMMoE inside a stock transformers model. No forward is replaced.

A forward with vision tokens passes, in this order: the head (which token asks), the multimodal model (which tokens are
vision tokens), the text model (the host-side plan), then per decoder layer the mask and RoPE of what is left, and at
a prune layer: attention (one row is captured), norm (its input is the residual stream), MoE (tokens are pruned in
front of it), layer (returns the shorter stream). Behind the last layer the sequence gets its length back.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastmmoe import attention, experts
from fastmmoe.adapters import find_text_model
from fastmmoe.config import FastMMoEConfig
from fastmmoe.prefill import CACHE_STATE, NO_EFFECT, CacheState, ForwardPass, Segment
from fastmmoe_kernels import VisionLayout, last_query_attention, prune_tokens, topk_routing
from fastmmoe_kernels.backend import resolve_backend
from fastmmoe_kernels.layout import device_table


class Hooks:
    """FastMMoE on one model: checks on construction, `install` and `remove`.

    Attributes:
        config: what to reduce.
        text_config: the text model's config.
        last: segments of the last forward with vision tokens, for the report; None before one.
    """

    def __init__(self, model: nn.Module, config: FastMMoEConfig):
        if model.training:
            raise ValueError("model: expected a model in evaluation mode, got one in training mode; call model.eval()")
        self.adapter, self._text, self._parent = find_text_model(model)
        self.config = config
        self.text_config = self._text.config
        self.last: list[Segment] | None = None
        self._heads = [m for m in model.modules() if _takes_logits_to_keep(m) and self._text in m.modules()]
        self._layers = list(self._text.layers)
        self._stages = {layer: stage for stage, layer in enumerate(config.prune_layers)}
        self._local = threading.local()
        self._handles: list[Any] = []
        self._configs: list[tuple[nn.Module, object]] = []
        self._check(model)

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
            if layer < len(self._layers) and layer not in moe:
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
        adapter = self.adapter
        for head in self._heads:
            self._before(head, _bound(head, self._before_head))
        self._before(self._parent, _bound(self._parent, self._before_parent))
        self._after(self._parent, self._after_parent)
        self._after(self._parent, self._clear_vision, always_call=True)
        self._before(self._text, _bound(self._text, self._before_text))
        self._after(self._text, self._after_text)
        self._after(self._text, self._clear_pass, always_call=True)

        first = min(self._stages, default=len(self._layers))
        for number, layer in enumerate(self._layers):
            if number > first:
                self._before(layer, functools.partial(self._before_layer, number))
            if number in self._stages:
                self._install_stage(number, layer)
            if number in self._reduced:
                module = adapter.experts_of(layer)
                self._override_config(
                    module,
                    _experts_implementation=functools.partial(self._experts_implementation, module.config),
                    fastmmoe_backend=lambda: self.config.backend,
                )
                self._after(adapter.gate_of(layer), functools.partial(self._after_gate, number))
        self._after(self._layers[-1], self._after_last_layer)

    def _install_stage(self, number: int, layer: nn.Module) -> None:
        adapter = self.adapter
        module = getattr(layer, adapter.attention)
        module.__dict__[attention.CAPTURE] = self._capture
        self._override_config(module, _attn_implementation=functools.partial(self._attn_implementation, module.config))
        self._before(module, functools.partial(self._before_attention, number))
        self._after(module, self._after_attention, always_call=True)
        self._before(getattr(layer, adapter.norm), functools.partial(self._before_norm, number))
        self._before(adapter.moe_of(layer), functools.partial(self._before_moe, number))
        self._after(adapter.moe_of(layer), self._after_moe)
        self._after(layer, self._after_prune_layer)

    def _before(self, module: nn.Module, hook: Callable) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))

    def _after(self, module: nn.Module, hook: Callable, always_call: bool = False) -> None:
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=always_call))

    def _override_config(self, module: nn.Module, **computed: Callable[[], object]) -> None:
        self._configs.append((module, module.config))
        module.config = attention.OverriddenConfig(module.config, **computed)

    def remove(self) -> None:
        """Take every trace of the hooks off the model."""
        while self._handles:
            self._handles.pop().remove()
        while self._configs:
            module, config = self._configs.pop()
            module.config = config
            module.__dict__.pop(attention.CAPTURE, None)

    # ---------------------------------------------------------------- what a forward is

    @property
    def _pass(self) -> ForwardPass | None:
        return getattr(self._local, "forward_pass", None)

    def _before_head(self, module: nn.Module, inputs: dict[str, Any]) -> None:
        keep = inputs.get("logits_to_keep")
        # the prompt's last token asks, not the candidates or answers behind it whose logits are wanted as well
        self._local.back = keep - 1 if isinstance(keep, int) and keep > 1 else 0

    def _before_parent(self, module: nn.Module, inputs: dict[str, Any]) -> None:
        self._local.vision = None
        self._local.vision = self.adapter.vision_mask(module, inputs)

    def _after_parent(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if getattr(self._local, "vision", None) is not None:
            raise RuntimeError("fastmmoe: no effect: a forward with vision tokens did not call the text model's module")

    def _clear_vision(self, *_: Any) -> None:
        self._local.vision = None
        self._local.back = 0

    def _before_text(self, module: nn.Module, inputs: dict[str, Any]) -> None:
        self._local.forward_pass = None
        vision = getattr(self._local, "vision", None)
        self._local.vision = None
        cache = inputs.get("past_key_values")
        state = getattr(cache, CACHE_STATE, None)
        if vision is None and state is None:
            return
        if module.training:
            raise RuntimeError(
                "model: expected evaluation mode, got training mode; fastmmoe.disable(model) to train it"
            )
        if inputs.get("output_router_logits") or getattr(self.text_config, "output_router_logits", False):
            raise ValueError("output_router_logits: not supported while FastMMoE is enabled, got True")
        if inputs.get("cu_seq_lens_q") is not None:
            raise ValueError("cu_seq_lens_q: packed batches are not supported while FastMMoE is enabled")
        embeds = inputs.get("inputs_embeds")
        batch, n = (inputs["input_ids"] if embeds is None else embeds).shape[:2]
        device = self._device(inputs)
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
        if vision is not None:
            layout = VisionLayout.from_mask(vision, None if new_mask is None else new_mask.to(vision.device))
            if not any(layout.n_vision) and state is None:
                return
            self._check_prompt_ends(layout)
            back = getattr(self._local, "back", 0)
            segment = Segment.from_layout(layout)
            back = back if back < min(layout.tails) else 0
        else:
            valid = torch.ones(batch, n, dtype=torch.bool, device=device) if new_mask is None else new_mask.bool()
            # one token per sample is a decode step; it would not be decoded if it were padding
            segment, back = Segment(valid, n == 1 or new_mask is None), 0
        self._local.forward_pass = ForwardPass(self.text_config, [segment], cache, past, state, old_mask, back)

    def _check_prompt_ends(self, layout: VisionLayout) -> None:
        """A sample's last token asks for the others and answers: it must not be pruned itself."""
        for sample, (n_vision, tail) in enumerate(zip(layout.n_vision, layout.tails, strict=True)):
            if self._stages and n_vision and not tail:
                raise ValueError(f"input_ids: sample {sample} ends in a vision token, expected text at the end")

    @staticmethod
    def _device(inputs: dict[str, Any]) -> torch.device:
        given = inputs.get("inputs_embeds")
        return (inputs["input_ids"] if given is None else given).device

    def _after_text(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        current = self._pass
        if current is None or not current.has_vision:
            return
        stages, reduced = len(current.segments) - 1, current.reduced_layers
        if stages != len(self._stages) or reduced != len(self._reduced):
            done = f"{stages} of {len(self._stages)} prune layers and {reduced} of {len(self._reduced)} expert layers"
            raise RuntimeError(NO_EFFECT.format(done))
        self.last = current.segments

    def _clear_pass(self, *_: Any) -> None:
        self._local.forward_pass = None

    # ---------------------------------------------------------------- layers behind a prune layer

    def _before_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        current = self._pass
        if current is None:
            return None
        behind = sum(stage_layer < number for stage_layer in self._stages)
        segment = current.segment(behind)
        if segment.index is None and current.state is None:
            return None
        if not current.has_vision and kwargs.get("attention_mask") is None and current.is_full(behind):
            return None  # decoding without padding: the stock path
        hidden = args[0] if args else kwargs["hidden_states"]
        kwargs = dict(kwargs, attention_mask=current.attention_mask_for(behind, number, hidden))
        if segment.index is not None:
            kwargs["position_embeddings"] = current.rope(behind, kwargs["position_embeddings"])
            # gaps in position ids look like packed sequences to flash attention, and RoPE is applied already
            kwargs["position_ids"] = None
        return args, kwargs

    # ---------------------------------------------------------------- a prune layer

    def _prunes(self, number: int) -> ForwardPass | None:
        """The current pass if it prunes at this layer: it has vision tokens, and some must go."""
        current = self._pass
        if current is None or not current.has_vision:
            return None
        layout = current.segments[-1].layout
        ratio = self.config.stage_keep_ratios[self._stages[number]]
        counts = layout.prune_counts(ratio, self.config.merge_ratio, self.config.window)
        return current if counts.targets != layout.n_vision else None

    def _attn_implementation(self, config: Any) -> str:
        return attention.NAME if getattr(self._local, "armed", False) else config._attn_implementation

    def _before_attention(self, number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._local.armed = self._prunes(number) is not None

    def _capture(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        self._local.armed = False
        current = self._pass
        segment = current.segments[-1]
        layout, n, behind = segment.layout, segment.valid.shape[1], len(current.segments) - 1
        if layout.padding_side == "left":
            asking = query[:, :, n - 1 - current.back]  # [B, Hq, D]
        else:
            last = device_table((tuple(length - 1 - current.back for length in layout.lengths),), query.device)
            last = last.long().view(-1, 1, 1, 1).expand(-1, query.shape[1], 1, query.shape[3])
            asking = query.gather(2, last)[:, :, 0]
        mask = None
        if not current.is_full(behind) or current.back:
            mask = current.key_mask(behind, key.device)
            if current.back:
                # candidates behind the asking token are no keys of its row
                keys = torch.arange(mask.shape[1], device=mask.device)
                ends = tuple(
                    mask.shape[1] - n + start + length - current.back
                    for start, length in zip(layout.starts, layout.lengths, strict=True)
                )
                mask = mask & (keys < device_table((ends,), mask.device).view(-1, 1))
        length = key.shape[2] if mask is None else mask.shape[1]  # a static cache is longer than its contents
        row = last_query_attention(asking, key[:, :, :length], scale=scale, key_mask=mask, backend=self.config.backend)
        current.importance = row[:, length - n :]

    def _after_attention(self, *_: Any) -> None:
        self._local.armed = False

    def _before_norm(self, number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        current = self._prunes(number)
        if current is not None:
            current.residual = args[0] if args else kwargs["hidden_states"]

    def _before_moe(self, number: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        current = self._pass
        if current is None or not current.has_vision:
            return None
        segment = current.segments[-1]
        if self._prunes(number) is None:
            current.segments.append(segment)
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        config = self.config
        pruned = prune_tokens(
            hidden,
            current.residual.to(hidden.device),
            self.adapter.gate_probs(self._layers[number], hidden),
            current.importance.to(hidden.device).contiguous(),
            segment.layout.to(hidden.device),
            keep_ratio=config.stage_keep_ratios[self._stages[number]],
            merge_ratio=config.merge_ratio,
            window=config.window,
            alpha=config.alpha,
            strategy=config.strategy,
            merge_method=config.merge_method,
            backend=config.backend,
        )
        current.segments.append(segment.after(pruned))
        current.short_residual = pruned.residual
        current.importance = current.residual = None
        if args:
            return (pruned.hidden, *args[1:]), kwargs
        return args, dict(kwargs, hidden_states=pruned.hidden)

    def _after_moe(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
        current = self._pass
        if current is None or current.short_residual is None:
            return None
        current.short_residual = current.short_residual + output.view_as(current.short_residual)
        # the layer adds this to its own, longer residual stream; `_after_prune_layer` returns the short sum instead
        return output.new_zeros(()).expand(current.segments[-2].valid.shape + output.shape[-1:])

    def _after_prune_layer(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        current = self._pass
        if current is None or current.short_residual is None:
            return None
        hidden, current.short_residual = current.short_residual, None
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

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
        current = self._pass
        return current if current is not None and current.has_vision else None

    def _experts_implementation(self, config: Any) -> str:
        return experts.NAME if self._reduces() is not None else config._experts_implementation

    def _after_gate(self, number: int, gate: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple | None:
        current = self._reduces()
        if current is None:
            return None
        segment = current.segments[-1]
        few = segment.layout.vision_mask
        if not segment.is_full:
            few = few | ~segment.valid.to(few.device)  # padding need not cost more than a vision token
        logits = output[0]
        routing = topk_routing(
            logits,
            vision_mask=few.flatten().to(logits.device),
            vision_top_k=self.config.vision_top_k,
            backend=self.config.backend,
            **self.adapter.routing_options(gate),
        )
        current.reduced_layers += 1
        return self.adapter.rerouted(output, routing)


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
