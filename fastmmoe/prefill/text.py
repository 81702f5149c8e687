"""What a forward of the text model is: which tokens it has, on which mask and cache, and what it leaves behind."""

import warnings
from typing import Any

import torch

from fastmmoe.families.kinds import CHUNKED, FULL, SLIDING, layer_kinds
from fastmmoe.prefill.attention import register_capture
from fastmmoe.prefill.cache import CACHE, CacheState, cache_in, check_lengths, forget, is_paged, state_of
from fastmmoe.prefill.entry import EntryPatch, special_tokens
from fastmmoe.prefill.masks import CallerMask
from fastmmoe.prefill.packing import read_masked_layout, read_packed_layout, read_positioned_layout
from fastmmoe.prefill.plan import Plan
from fastmmoe.prefill.running import RUNNING, Call
from fastmmoe.prefill.sequence import NO_EFFECT, ForwardPass, Segment
from fastmmoe.prefill.unmasked import leave_out_full_masks
from fastmmoe_kernels import VisionLayout


class TextPatch(EntryPatch):
    """On the text model."""

    __slots__ = ()
    level = 2

    def copied(self) -> None:
        warnings.warn(
            "fastmmoe: a copy of an enabled model is a stock model; call fastmmoe.enable on the copy", stacklevel=3
        )

    def enter(self, call: Call, inputs: dict[str, Any]) -> None:
        vision = call.vision
        if vision is not None and tuple(vision.shape) != _shape(inputs)[:2]:
            vision = None  # not the forward that the multimodal model was called for
        RUNNING.forward = self._forward_pass(call, inputs, vision)

    @torch.compiler.disable
    def begin(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = super().begin(args, kwargs)
        forward, names = RUNNING.forward, self.installation.family.injected
        if names is None or forward is None or not forward.has_vision or not forward.plan.stages:
            return args, kwargs
        mask, features = map(kwargs.get, names)
        first = forward.plan.first_stage
        if features is None or len(features) <= first:
            return args, kwargs
        # from the first prune layer on the model would add them to tokens that are gone
        forward.injected = mask, features
        return args, kwargs | {names[1]: features[:first]}

    # ---------------------------------------------------------------- what a forward is

    def _forward_pass(self, call: Call, inputs: dict[str, Any], vision: torch.Tensor | None) -> ForwardPass | None:
        """What the layers work from; None: the stock model runs."""
        plan, cache, layout = call.plan, cache_in(inputs), self.installation.layout
        state = state_of(cache)
        if is_paged(cache):
            self._check_requests(plan, vision is not None or layout is not None)
            return None
        if state is None and cache is not None and plan is not None and plan.stages:
            check_lengths(cache, plan.first_stage)
        if plan is None:
            return None
        if vision is None and layout is None and state is None:
            if self._hides_vision(call, inputs) or not plan.config.reduces_text:
                return None
        self._check_inputs(plan, inputs)
        if inputs.get("cu_seq_lens_q") is not None:
            return self._packed(call, inputs, vision, layout)
        if layout is not None:
            return self._fixed(call, inputs, cache, state, layout)
        batch, n, device = _shape(inputs)
        past = _cached_tokens(cache, state, n)
        if past == 0 and state is not None:
            forget(cache)
            state = None
        if state is not None:
            self._check_state(plan, state, batch)
            if past < state.length:
                state.crop_to(past)
        mask, skips = CallerMask.of(inputs.get("attention_mask"), past, n, batch), False
        if vision is not None:
            packed = False
            if mask.pairs is not None and plan.stages:
                self._check_windows(inputs["attention_mask"])
                layout, mask, packed = read_masked_layout(vision, mask, past)
            elif plan.stages and self._may_hold_samples(inputs):
                layout, packed = read_positioned_layout(vision, _text_positions(inputs))
            else:
                valid = None if mask.valid is None else mask.valid.to(vision.device)
                layout = VisionLayout.from_mask(vision, valid)
            if packed:
                self._check_packable(plan)
            if mask.pairs is not None and plan.stages:
                self._check_pairs()
            skips = _skips(plan, layout)
            if not skips and (any(layout.n_vision) or state is not None):
                return self._prefill(call, inputs, layout, cache, past, state, mask, packed)
        if state is not None and mask.pairs is not None and set(layer_kinds(self.module.config)) - {FULL}:
            mask = self._keys_of(mask, past)
        return self._without_vision(call, inputs, cache, past, state, mask, skips)

    @staticmethod
    def _check_requests(plan: Plan | None, has_vision: bool) -> None:
        """Refuse what continuous batching would leave undone: a prompt of text alone has nothing to reduce.

        Raises:
            RuntimeError: vision tokens, or a plan that gives text fewer experts.
        """
        if plan is not None and (has_vision or plan.config.reduces_text):
            what = "vision tokens" if has_vision else f"text tokens under {type(plan.config).__name__}"
            raise RuntimeError(
                f"fastmmoe: no effect: continuous batching (generate_batch) mixes requests in a forward, and {what} "
                "are not reduced there; use model.generate"
            )

    def _without_vision(
        self,
        call: Call,
        inputs: dict[str, Any],
        cache: Any,
        past: int,
        state: CacheState | None,
        mask: CallerMask,
        skips: bool = False,
    ) -> ForwardPass | None:
        """A forward that prunes nothing; `skips`: it has vision tokens, but too few to reduce anything."""
        if state is None and (skips or not call.plan.config.reduces_text):
            return None
        batch, n, device = _shape(inputs)
        valid = torch.ones(batch, n, dtype=torch.bool, device=device) if mask.valid is None else mask.valid
        # one token per sample is a decode step; it would not be decoded if it were padding
        segment = Segment(valid, n == 1 or mask.valid is None)
        forward = ForwardPass(self.installation, call.plan, self.module.config, [segment], cache, past, state, mask)
        forward.special, forward.stock_experts = self._special(call, inputs), skips
        return forward

    def _special(self, call: Call, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Where the forward's tokens that are neither text nor vision stand, bool [B, n]."""
        special = call.special
        if special is None or tuple(special.shape) != _shape(inputs)[:2]:
            special = special_tokens(call, self.module, inputs)
        return special

    def _may_hold_samples(self, inputs: dict[str, Any]) -> bool:
        """Whether transformers takes a row for several samples where its position ids begin anew."""
        use_cache, positions = inputs.get("use_cache"), _text_positions(inputs)
        use_cache = self.module.config.use_cache if use_cache is None else use_cache
        absent = inputs.get("attention_mask") is None and cache_in(inputs) is None and not use_cache
        if not absent or positions is None or inputs["position_ids"].dim() not in self.installation.family.rows_by:
            return False
        return positions.dim() == 2 and positions.shape[0] == 1

    def _packed(
        self, call: Call, inputs: dict[str, Any], vision: torch.Tensor | None, layout: VisionLayout | None
    ) -> ForwardPass | None:
        """A forward over one row of samples, see `fastmmoe.pack_batch`."""
        plan = call.plan
        if layout is not None:
            raise ValueError("cu_seq_lens_q: packed batches are not supported within fixed_layout")
        self._check_packable(plan)
        positions, rope = inputs.get("position_ids"), getattr(self.module.config, "rope_parameters", None) or {}
        if "mrope_section" in rope and positions is not None and (positions.dim() != 3 or len(positions) != 4):
            raise ValueError(
                "position_ids: expected [4, 1, T] with cu_seq_lens_q, those of text and in time, height and width; "
                "give them to pack_batch"
            )
        if cache_in(inputs) is not None or inputs.get("use_cache") is not False:
            raise ValueError("use_cache: expected False and no cache with cu_seq_lens_q: nothing is decoded from a row")
        mask = inputs.get("attention_mask")
        if isinstance(mask, dict):  # not the caller's
            raise ValueError(
                f"cu_seq_lens_q: not supported with {self.installation.family.title}, whose multimodal model makes "
                "masks of the whole row; expected a padded batch"
            )
        if mask is not None:
            raise ValueError("attention_mask: expected None with cu_seq_lens_q, got one")
        whole = CallerMask(None, None, None)
        if vision is None:
            return self._without_vision(call, inputs, None, 0, None, whole)
        layout = read_packed_layout(vision, inputs["cu_seq_lens_q"])
        skips = _skips(plan, layout)
        if skips or not any(layout.n_vision):
            return self._without_vision(call, inputs, None, 0, None, whole, skips)
        return self._prefill(call, inputs, layout, None, 0, None, whole, packed=True)

    def _fixed(
        self, call: Call, inputs: dict[str, Any], cache: Any, state: CacheState | None, layout: VisionLayout
    ) -> ForwardPass | None:
        """A forward on an empty cache whose layout is known: nothing is read from the device."""
        batch, n, device = _shape(inputs)
        if (batch, n) != (layout.batch_size, layout.width):
            raise ValueError(
                f"layout: expected forwards with {layout.batch_size} samples of {layout.width} tokens within "
                f"fixed_layout, got {batch} of {n}"
            )
        if state is not None:
            raise ValueError(f"{CACHE}: expected an empty cache within fixed_layout, got one of a prefill")
        if not layout.is_full and inputs.get("attention_mask") is None:
            raise ValueError("attention_mask: expected one for a layout with padding, got None")
        mask = CallerMask.of(inputs.get("attention_mask"), 0, n, batch)
        if not any(layout.n_vision):
            return self._without_vision(call, inputs, cache, 0, None, mask)
        if mask.pairs is not None and call.plan.stages:
            raise ValueError("attention_mask: expected a 2D mask within fixed_layout where tokens are pruned, got 4D")
        leave_out_full_masks()
        return self._prefill(call, inputs, layout.to(device), cache, 0, None, mask)

    def _prefill(
        self,
        call: Call,
        inputs: dict[str, Any],
        layout: VisionLayout,
        cache: Any,
        past: int,
        state: CacheState | None,
        mask: CallerMask,
        packed: bool = False,
    ) -> ForwardPass:
        """A forward with vision tokens."""
        plan = call.plan
        self.installation.check(plan)
        if plan.stages:
            _check_prompt_ends(layout)
            register_capture(self.module.config._attn_implementation)
        # of a packed row, the last logits are those of its last sample: no candidates
        back = call.back if call.back < min(layout.tails) and not packed else 0
        segment = Segment.from_layout(layout, packed)
        forward = ForwardPass(self.installation, plan, self.module.config, [segment], cache, past, state, mask, back)
        forward.special = self._special(call, inputs)

        def embeddings() -> torch.Tensor:
            row = inputs.get("inputs_embeds")
            row = self.module.get_input_embeddings()(inputs["input_ids"]) if row is None else row
            return segment.packing.pad(row) if packed else row

        if plan.stages:
            forward.prompt = plan.pruning.read_prompt(embeddings, layout, back)
        return forward

    # ---------------------------------------------------------------- how it ends

    @torch.compiler.disable
    def finish(self, output: Any) -> Any:
        """Check that all has run, leave on the cache what later forwards must know, give the output its length."""
        forward = RUNNING.forward
        if forward is None:
            return output
        plan = forward.plan
        if forward.has_vision or forward.reduces:
            mine, places = forward.token, [plan.places[number] for number in plan.reduced]
            done = {
                "prune layers": (len(forward.segments) - 1, len(plan.stages) if forward.has_vision else 0),
                "gates": (sum(place.gate.marks(mine) for place in places), len(places)),
                "experts": (sum(place.experts.marks(mine) for place in places), len(places)),
            }
            if any(ran != wanted for ran, wanted in done.values()):
                what = ", ".join(f"{ran} of {wanted} {kind}" for kind, (ran, wanted) in done.items())
                raise RuntimeError(NO_EFFECT.format(what))
        if forward.has_vision:
            plan.last, plan.skipped = list(forward.segments), False
            chosen = ((number, plan.places[number].chosen) for number in plan.reduced)
            plan.chosen = {number: last[1] for number, last in chosen if last and last[0] is forward.token}
        forward.remember()
        if not forward.has_vision or forward.segments[-1].index is None:
            return output
        short = output[0]
        return _replaced(output, short, forward.restore_length(short))

    @torch.compiler.disable
    def end(self, call: Call | None, forward: ForwardPass | None, at: int | None) -> None:
        if RUNNING.forward is not None and RUNNING.forward is not forward:
            RUNNING.forward.token.end()
        super().end(call, forward, at)

    # ---------------------------------------------------------------- what is refused

    def _check_inputs(self, plan: Plan, inputs: dict[str, Any]) -> None:
        """Refuse a forward that FastMMoE cannot take part in."""
        if self.module.training:
            raise RuntimeError(
                "model: expected evaluation mode, got training mode; fastmmoe.disable(model) to train it"
            )
        if inputs.get("output_router_logits") or getattr(self.module.config, "output_router_logits", False):
            raise ValueError("output_router_logits: not supported while FastMMoE is enabled, got True")
        obstacle = self.installation.family.hidden_states_obstacle
        if obstacle and plan.stages and inputs.get("output_hidden_states"):
            raise ValueError(f"output_hidden_states: not supported where tokens are pruned, got True: {obstacle}")

    def _check_windows(self, mask: Any) -> None:
        """Refuse one mask for layers of all kinds, which says that none of them has a window."""
        narrow = sorted(set(layer_kinds(self.module.config)) & {SLIDING, CHUNKED})
        if narrow and not isinstance(mask, dict):
            raise ValueError(
                f"attention_mask: expected 2D where tokens are pruned and layers are of {', '.join(narrow)}, got 4D"
            )

    def _check_pairs(self) -> None:
        """Refuse a mask that is not plain causal attention where layers make other masks of it."""
        others = sorted(set(layer_kinds(self.module.config)) - {FULL})
        if others:
            raise ValueError(
                "attention_mask: expected 2D or causal where tokens are pruned and layers are of "
                f"{', '.join(others)}, got 4D"
            )

    def _keys_of(self, mask: CallerMask, past: int) -> CallerMask:
        """A mask of pairs over a pruned cache as one of keys, from which every kind of layer makes its own."""
        is_causal, keys = mask.as_keys(past, torch.zeros_like(mask.valid))
        # whichever keys a single token sees, they are those that are valid
        if mask.pairs.shape[2] > 1 and not is_causal.all():
            self._check_pairs()
        return CallerMask(mask.valid, keys, None)

    def _check_packable(self, plan: Plan) -> None:
        """Refuse to prune samples in one row where layers would mix them up."""
        others = sorted(set(layer_kinds(self.module.config)) - {FULL, SLIDING})
        is_flash = "flash" in self.module.config._attn_implementation
        if plan.stages and not self.installation.family.rows_by and not is_flash:
            raise ValueError(
                "input_ids: several samples in one row are not supported where tokens are pruned: without flash "
                f"attention, {self.installation.family.title} mixes them; expected a padded batch"
            )
        if plan.stages and others:
            raise ValueError(
                "input_ids: several samples in one row are not supported where tokens are pruned and layers are of "
                f"kind {', '.join(others)}; expected a padded batch"
            )

    def _check_state(self, plan: Plan, state: CacheState, batch: int) -> None:
        """Refuse a pruned cache that this forward cannot go on from."""
        if state.packed:
            raise RuntimeError(f"{CACHE}: holds several samples packed in one row; nothing is decoded from it")
        there, here = (state.prune_layers, state.prunes_behind_layer), plan.config
        if there != (here.prune_layers, here.prunes_behind_layer):
            raise RuntimeError(
                f"{CACHE}: holds vision tokens that were pruned at layers {state.prune_layers}, and the config "
                f"now enabled prunes at {here.prune_layers or 'none'}; enable it as it was, or start from a fresh cache"
            )
        if state.batch_size != batch:
            raise RuntimeError(
                f"{CACHE}: holds pruned vision tokens of {state.batch_size} samples, got a batch of {batch}"
            )

    @staticmethod
    def _hides_vision(call: Call, inputs: dict[str, Any]) -> bool:
        """Whether a prompt of embeddings does not tell which are vision tokens; warns if that matters."""
        if not call.by_embeddings or _shape(inputs)[1] == 1:
            return False
        if call.plan.stages or call.plan.reduced:
            warnings.warn(
                "fastmmoe: a forward with inputs_embeds and no vision features runs on the stock model: it is not "
                "known which of its tokens are vision tokens; say it with fastmmoe.fixed_layout(model, layout)",
                stacklevel=4,
            )
        return True


def _text_positions(inputs: dict[str, Any]) -> torch.Tensor | None:
    """The position ids [B, n] by which transformers tells samples in one row apart, if it was given any."""
    positions = inputs.get("position_ids")
    # beside those in time, height and width
    return positions[0] if positions is not None and positions.dim() == 3 and len(positions) == 4 else positions


def _skips(plan: Plan, layout: VisionLayout) -> bool:
    """Whether a forward has too few vision tokens to gain anything; the report is told."""
    if not 0 < sum(layout.n_vision) < plan.config.min_vision_tokens:
        return False
    plan.last, plan.skipped, plan.chosen = [Segment.from_layout(layout)], True, {}
    return True


def _check_prompt_ends(layout: VisionLayout) -> None:
    """A sample's last token asks for the others and answers: it must not be pruned itself."""
    for sample, (n_vision, tail) in enumerate(zip(layout.n_vision, layout.tails, strict=True)):
        if n_vision and not tail:
            raise ValueError(f"input_ids: sample {sample} ends in a vision token, expected text at the end")


def _shape(inputs: dict[str, Any]) -> tuple[int, int, torch.device]:
    """(samples, tokens per sample, device) of a text model's forward."""
    embeds = inputs.get("inputs_embeds")
    tokens = inputs["input_ids"] if embeds is None else embeds
    return tokens.shape[0], tokens.shape[1], tokens.device


def _cached_tokens(cache: Any, state: CacheState | None, new: int) -> int:
    """Tokens of the full sequence in the cache; layer 0 always holds all of them."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    # a static cache counts on the device: do not wait for it in every decode step
    if isinstance(length, torch.Tensor) and state is not None and new == 1:
        return state.seen
    return int(length)


def _replaced(output: Any, short: torch.Tensor, full: torch.Tensor) -> Any:
    """A model's output with one tensor in place of another, wherever it stands."""
    if output is short:
        return full
    if isinstance(output, dict):
        for name, value in output.items():
            output[name] = _replaced(value, short, full)
        return output
    return tuple(_replaced(value, short, full) for value in output) if isinstance(output, tuple) else output
