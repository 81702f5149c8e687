"""A multimodal model of vLLM's with reduced prefills: the part that all families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.sequence import IntermediateTensors

from fastmmoe.engines.vllm.experts import reduce_experts, routing_of
from fastmmoe.engines.vllm.metadata import StageTables, stage_backend
from fastmmoe.engines.vllm.options import check_graphs, rules_of
from fastmmoe.engines.vllm.plan import Prompt, Row, Rules, Step
from fastmmoe.engines.vllm.prefill import Layers, Tokens, prune_layer, restore
from fastmmoe.engines.vllm.requests import Requests
from fastmmoe.engines.vllm.runners import ReducedModelState, wrap_v1_runner
from fastmmoe.engines.vllm.stretches import Stretch, make_stretch

logger = init_logger(f"vllm.{__name__}")


class Reduction:
    """What a reduced model knows beside its weights.

    Attributes:
        requests: those that its runner runs.
        step: the plan of the forward that is next or under way; None while profiling or capturing a graph.
        tokens: of the step, while the own loop runs it.
    """

    def __init__(self, rules: Rules, layers: Layers, vllm_config: VllmConfig, device: torch.device):
        self.config, self.layers = rules.config, layers
        self.requests = Requests(rules)
        self.step: Step | None = None
        self.tokens: Tokens | None = None
        self._check_attention()
        self._tables = [StageTables(vllm_config, device) for _ in rules.config.prune_layers]
        self._set_attention_backends()
        self._reduce_experts()
        self._parts = self._cut_in_parts(vllm_config)
        self._is_warm = False

    def begin(self, step: Step | None) -> None:
        """Get ready for the attention metadata of a step, and for the step itself."""
        self.step = step
        for number, tables in enumerate(self._tables, start=1):
            tables.begin(step, number)

    @property
    def is_next(self) -> bool:
        """Whether the next forward has vision tokens to reduce."""
        return self.step is not None and (self.step.prunes or self._has_fewer_experts and self.step.n_vision[0] > 0)

    def _check_attention(self) -> None:
        for number, layer in enumerate(self.layers.layers):
            attn = getattr(getattr(layer, "self_attn", None), "attn", None)
            # windows and chunks would be counted in places of the shortened cache
            is_full = type(attn) is Attention and attn.sliding_window is None
            if attn is None or self.config.prune_layers and not is_full:
                raise ValueError(
                    f"prune_layers={self.config.prune_layers}: not supported here: layer {number} is a "
                    f"{type(layer).__name__}, expected full attention (at self_attn.attn) in every layer"
                )

    def _set_attention_backends(self) -> None:
        stages = 0
        for number, layer in enumerate(self.layers.layers):
            if stages:
                attn = layer.self_attn.attn
                attn.attn_backend = stage_backend(attn.attn_backend, self._tables[stages - 1], stages)
            stages += number in self.config.prune_layers

    def _reduce_experts(self) -> None:
        runners = {
            number: layer.mlp.experts
            for number, layer in enumerate(self.layers.layers)
            if isinstance(getattr(layer.mlp, "experts", None), MoERunner)
        }
        self._scoring = {number: routing_of(runners[number])["scoring"] for number in self.config.prune_layers}
        wanted = self.config.vision_top_k
        self._has_fewer_experts = False
        for number, runner in runners.items():
            if wanted is not None and number >= self.config.reduction_layer and wanted < runner.router.top_k:
                self._has_fewer_experts = True
                reduce_experts(runner, lambda: self.tokens, wanted, self.config.backend)

    def _cut_in_parts(self, vllm_config: VllmConfig) -> list[Stretch | nn.Module]:
        parts: list[Stretch | nn.Module] = []
        stretch: list[tuple[int, nn.Module]] = []
        for number, layer in enumerate(self.layers.layers):
            if number not in self.config.prune_layers:
                stretch.append((number, layer))
                continue
            if stretch:
                parts.append(make_stretch(vllm_config, tuple(stretch)))
            parts.append(layer)
            stretch = []
        return parts + ([make_stretch(vllm_config, tuple(stretch))] if stretch else [])

    def run(
        self, positions: torch.Tensor, hidden: torch.Tensor, added: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """A forward of the step.

        Args:
            positions: int64 [..., T], and padding.
            hidden: floating [T, H], and padding: the text model's input.
            added: floating [T, H] by layer, and padding: what the model adds behind these layers.

        Returns:
            [T, H] and padding, behind the last norm; zeros at tokens that are gone.
        """
        context = get_forward_context()
        tokens = Tokens(self.step, hidden.device)
        length, count = len(hidden), len(tokens.origin)
        self._name_slots([int(self.step.bounds(stage)[-1]) for stage in range(len(self._tables) + 1)])
        # graphs are known by numbers of tokens that this step does not keep
        mode, context.cudagraph_runtime_mode = context.cudagraph_runtime_mode, CUDAGraphMode.NONE
        self.tokens = tokens
        try:
            # compiled code goes by the strides it was compiled with, and behind a stage there are no gaps
            positions = positions[..., :count].contiguous()
            hidden, residual = self._run_parts(tokens, positions, hidden[:count], added)
            hidden, _ = self.layers.norm(hidden, residual)
            return restore(tokens, hidden, length)
        finally:
            self.tokens = None
            context.cudagraph_runtime_mode = mode

    def _run_parts(
        self, tokens: Tokens, positions: torch.Tensor, hidden: torch.Tensor, added: Mapping[int, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual, number = None, 0
        for part in self._parts:
            if isinstance(part, Stretch):
                inputs = {str(n): tokens.left_of(added[n]) for n, _ in part.numbered if n in added}
                hidden, residual = part(positions, hidden, residual, IntermediateTensors(inputs) if inputs else None)
                number += len(part.numbered)
            else:
                positions, hidden, residual = prune_layer(
                    tokens, self.layers, part, self._scoring[number], self.config, positions, hidden, residual
                )
                if number in added:
                    hidden = hidden + tokens.left_of(added[number])
                number += 1
        return hidden, residual

    def warm_up(self, positions: torch.Tensor, hidden: torch.Tensor, added: Mapping[int, torch.Tensor]) -> None:
        """Once, while vLLM profiles: compile the stretches and the kernels, and let their memory be measured."""
        context, rules = get_forward_context(), self.requests.rules
        count = min(len(hidden), rules.longest)
        if self._is_warm or context.attn_metadata is not None or count < 2:
            return
        self._is_warm = True
        prompt = Prompt.of(rules, count, [(0, count - 1)], wants_logprobs=False)
        self.step = Step(len(self._tables), [Row(prompt, 0, count, prompt.prunes)])
        context.moe_layer_index = 0  # another pass of the same forward
        try:
            self.run(positions, hidden, added)
        finally:
            self.step, context.moe_layer_index = None, 0

    def name_slots(self) -> None:
        """Tell a stock forward in which slots layers behind prune stages put keys and values."""
        self._name_slots(None)

    def _name_slots(self, lengths: list[int] | None) -> None:
        slots, stages = get_forward_context().slot_mapping, 0
        if not slots or not self.config.prune_layers:
            return
        for number, layer in enumerate(self.layers.layers):
            name = layer.self_attn.attn.layer_name
            table = self._tables[stages - 1].slots if stages else slots[name]
            slots[name] = table[: len(slots[name]) if lengths is None else lengths[stages]]
            stages += number in self.config.prune_layers


class ReducedModel:
    """Mixed in front of a model class of vLLM's: stock unless `additional_config` asks for a reduction.

    A family says in `text_layers` where its text model is, if elsewhere than most have it, and in `added_behind` what
    it adds behind layers.
    """

    reduction: Reduction | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        rules = rules_of(vllm_config)
        if rules is None:
            return
        check_graphs(vllm_config)  # vLLM may have chosen others since it started
        layers = self.text_layers()
        device = next(layers.layers.parameters()).device
        self.reduction = Reduction(rules, layers, vllm_config, device)
        # an attribute of instances: vLLM asks whether it is there
        self.get_model_state_cls = lambda: ReducedModelState
        if not vllm_config.use_v2_model_runner:
            wrap_v1_runner()
        logger.info("fastmmoe: %s; prompts of up to %d tokens are pruned", rules.config, rules.longest)

    def text_layers(self) -> Layers:
        """Where the text model is."""
        text_model = self.language_model.model
        return Layers(layers=text_model.layers, norm=text_model.norm)

    def added_behind(self, num_tokens: int) -> dict[int, torch.Tensor]:
        """Of the next forward of so many tokens: what is added behind layers, floating [T, H] by layer."""
        return {}

    def clear_added(self, num_tokens: int) -> None:
        """Forget it: the forward has run."""

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        reduction = self.reduction
        if reduction is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        if not reduction.is_next:
            reduction.name_slots()
            output = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            if reduction.step is None and inputs_embeds is not None:
                reduction.warm_up(positions, inputs_embeds, self.added_behind(len(inputs_embeds)))
            return output
        if inputs_embeds is None:
            raise RuntimeError("fastmmoe: a step with vision tokens came without their embeddings")
        tokens = len(inputs_embeds)
        output = reduction.run(positions, inputs_embeds, self.added_behind(tokens))
        self.clear_added(tokens)
        return output
