"""What a config comes to on one model: which layers prune, which take fewer experts. Refuses what could not work."""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed import ProcessGroup

from fastmmoe.config import ReductionConfig
from fastmmoe.families import Family, architecture_of
from fastmmoe.methods.method import Pruning
from fastmmoe.prefill.patch import innermost
from fastmmoe.prefill.place import Place
from fastmmoe.prefill.sequence import Segment
from fastmmoe.prefill.sharding import holds_fsdp_unit, work_group
from fastmmoe_kernels.backend import resolve_backend


@dataclass(eq=False)
class Plan:
    """A config on one text model.

    Attributes:
        config: what to reduce.
        pruning: the config's way of pruning.
        stages: number of each prune layer -> number of its stage, both from 0.
        reduced: layers whose tokens take fewer experts.
        places: of all layers.
        head_groups: stage -> the processes among which its layer's attention heads are split; None: they are not.
        last: segments of the last forward with vision tokens under this plan, for the report; None before one.
        chosen: layer -> int [T, K], what the gates of that forward chose, where only they know how many experts that
            are; without layers where another thread's forward ran in between.
        skipped: the last forward with vision tokens had fewer than `config.min_vision_tokens`.
    """

    config: ReductionConfig
    pruning: Pruning
    stages: dict[int, int]
    reduced: tuple[int, ...]
    places: tuple[Place, ...]
    head_groups: dict[int, ProcessGroup | None]
    last: list[Segment] | None = field(default=None, repr=False)
    chosen: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    skipped: bool = False

    @classmethod
    def of(cls, family: Family, text: nn.Module, config: ReductionConfig) -> "Plan":
        """Check a config against a text model.

        Raises:
            ValueError, RuntimeError: what would fail, or silently do nothing, in a forward; names the argument.
        """
        if text.training:
            raise ValueError("model: expected a model in evaluation mode, got one in training mode; call model.eval()")
        resolve_backend(config.backend, next(text.parameters()))
        layers = [innermost(layer) for layer in text.layers]
        for number, layer in enumerate(layers):
            if type(layer).__name__ == "PipelineIdentityLayer":
                raise ValueError(f"model: layer {number} is another process's; pipeline parallelism is not supported")
        moe = [number for number, layer in enumerate(layers) if family.is_moe(layer)]
        if not moe:
            raise ValueError("model: no layer holds routed experts")
        for number in config.prune_layers:
            if number < len(layers) and number not in moe and not config.prunes_behind_layer:
                raise ValueError(f"prune_layers: layer {number} is not a MoE layer")
            if number < len(layers) and (reason := family.why_not_prune(text.config, number)):
                raise ValueError(f"prune_layers: layer {number} of {family.title} cannot prune: {reason}")
        if config.reduces_experts and (reason := family.expert_obstacle(text.config)):
            name = "config" if config.vision_top_k is None else "vision_top_k"
            raise ValueError(f"{name}: {family.title}'s vision tokens cannot take fewer experts: {reason}")
        if config.reduces_text and family.vision_only:
            raise ValueError(f"config: {family.title}'s text tokens have experts of their own, which cannot be fewer")
        top_k = getattr(text.config, family.top_k)
        config.check_model(len(layers), top_k)
        if config.vision_top_k is not None and config.vision_top_k < top_k and moe[-1] < config.reduction_layer:
            raise ValueError(f"reduction_layer: no MoE layer from layer {config.reduction_layer} on")
        words = text.get_input_embeddings().num_embeddings
        if unknown := [token for token in config.special_tokens if token >= words]:
            raise ValueError(f"special_tokens: got {unknown[0]}, expected ids of the model's {words} words")
        choices = {number: config.expert_choice(number, top_k) for number in moe}
        reduced = tuple(number for number, choice in choices.items() if choice is not None)
        for number in sorted({*reduced, *config.prune_layers} & set(moe)):
            gate = innermost(family.gate_of(layers[number]))
            try:
                options = family.routing_options(gate, *family.gate_arguments(family.moe_of(layers[number])))
            except AttributeError as error:
                raise ValueError(
                    f"model: layer {number}'s gate ({type(gate).__name__}) is not {family.title}'s "
                    f"({family.gate_class}): {error}; another version of transformers may have that one"
                ) from None
            if number in config.prune_layers and not config.prunes_behind_layer and holds_fsdp_unit(gate):
                # asked once more where tokens are pruned: a process without pictures would not take part
                raise ValueError(
                    f"prune_layers: layer {number}'s gate cannot be asked: FSDP gathers its weights for it alone; "
                    "leave it to its layer (fsdp_plan), or prune behind layers"
                )
            if choices[number] is not None:
                groups = options.get("n_group", 1)
                choices[number].check_experts(architecture_of(text.config).num_experts, groups, family.title)
        for number in reduced:
            experts = innermost(family.experts_of(layers[number]))
            work_group(layers[number], experts, f"layer {number}'s experts")
            implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
            if implementation == "deepgemm_megamoe":
                raise ValueError(
                    "model: experts_implementation='deepgemm_megamoe' is not supported together with fewer experts: "
                    "its kernel routes the tokens between processes itself"
                )
        stages = {layer: stage for stage, layer in enumerate(config.prune_layers)}
        places = [
            Place(sum(stage < n for stage in stages), stages.get(n), choices.get(n)) for n in range(len(layers))
        ]
        pruning, groups = config.pruning(), {}
        for number, stage in stages.items() if pruning.looks else ():
            attention = innermost(family.attention_of(layers[number]))
            groups[stage] = work_group(layers[number], attention, f"layer {number}'s attention")
        return cls(config, pruning, stages, reduced, tuple(places), groups)

    @property
    def first_stage(self) -> int | None:
        """The first prune layer."""
        return min(self.stages, default=None)
