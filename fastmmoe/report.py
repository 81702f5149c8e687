"""What the last prefill did: tokens per layer, what was kept, merged and dropped, and the FLOPs."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastmmoe.config import ReductionConfig
from fastmmoe.cost.devices import DEVICES, known_device
from fastmmoe.cost.flops import FlopsReport, flops
from fastmmoe.cost.prefill_time import TimeReport, prefill_time
from fastmmoe.families import Architecture, architecture_of
from fastmmoe.methods import FastMMoEConfig
from fastmmoe.prefill.installation import installation_of, plan_in_force
from fastmmoe.prefill.plan import Plan
from fastmmoe.prefill.sequence import Segment

KEPT, MERGED, DROPPED, GONE = range(4)  # values of StageReport.fate


@dataclass(frozen=True)
class StageReport:
    """One prune stage; all counts per sample.

    Attributes:
        layer: the decoder layer.
        entering: vision tokens that reach the stage.
        kept: survivors as they were.
        merged: survivors that stand for several: a merged window, or a cluster of recycled tokens.
        dropped: entering - kept - merged.
        fate: int8 [n_vision of the prompt] per sample, in sequence order: 0 kept, 1 member of a merged window
            (of recycled tokens, the one whose place their cluster takes), 2 dropped here, 3 gone at an earlier stage.
    """

    layer: int
    entering: tuple[int, ...]
    kept: tuple[int, ...]
    merged: tuple[int, ...]
    dropped: tuple[int, ...]
    fate: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class PrefillReport:
    """The last prefill of an enabled model.

    Attributes:
        n_text, n_vision: tokens of the prompt, per sample.
        tokens_per_layer: per layer and sample, the tokens in that layer's MoE (or MLP).
        stages: one per prune layer.
        architecture, config: what ran: the text model's sizes, and what was reduced.
        device: where the model lies, as `fastmmoe.prefill_time` calls it; None: it knows no ceilings of it.
        own_experts: layers whose tokens take fewer experts, and where the model's own run, on one row per token and
            expert: the kernel does not know them.
        expert_pairs: layer -> pairs of a token and an expert that ran, of text and of vision tokens, where experts were
            skipped by what a token needs; without layers in which another thread's prefill ran in between: there
            `flops` counts all that may have run.
        flops: FLOPs of the language model's prefill over the whole batch.
        skipped: the stock model ran, with fewer vision tokens than the config's `min_vision_tokens`.
    """

    n_text: tuple[int, ...]
    n_vision: tuple[int, ...]
    tokens_per_layer: tuple[tuple[int, ...], ...]
    stages: tuple[StageReport, ...]
    flops: FlopsReport
    architecture: Architecture = field(repr=False)
    config: ReductionConfig = field(repr=False)
    device: str | None
    own_experts: tuple[int, ...] = ()
    expert_pairs: dict[int, tuple[int, int]] = field(default_factory=dict)
    skipped: bool = False

    def time(self, device: str | Path | None = None) -> TimeReport:
        """Calculate this prefill's floor on a device of `fastmmoe.prefill_time`, by default where the model lies.

        Raises:
            ValueError: an unknown device, or none is given and the model lies on one whose ceilings are not known.
        """
        device = device or self.device
        if device is None:
            known = f"one of {', '.join(DEVICES)}, cpu or a .json file"
            raise ValueError(f"device: that of the model has no known ceilings, expected {known}, got None")
        left = [[kept + merged for kept, merged in zip(s.kept, s.merged, strict=True)] for s in self.stages]
        return prefill_time(
            self.architecture, self.n_text, self.n_vision, self.config, device,
            vision_left=left, expert_pairs=self.expert_pairs,
        )  # fmt: skip

    @property
    def experts_skipped(self) -> float:
        """Share of the pairs of a token and an expert that were skipped by need, in the layers of `expert_pairs`."""
        top_k, n_text = self.architecture.num_experts_per_tok, sum(self.n_text)
        ran = most = 0
        for layer, pairs in self.expert_pairs.items():
            choice = self.config.expert_choice(layer, top_k)
            ran += sum(pairs)
            most += n_text * top_k + (sum(self.tokens_per_layer[layer]) - n_text) * choice.vision_top_k
        return 1.0 - ran / most if most else 0.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, without `fate`."""
        stages = [{k: v for k, v in asdict(stage).items() if k != "fate"} for stage in self.stages]
        return {
            "n_text": list(self.n_text),
            "n_vision": list(self.n_vision),
            "tokens_per_layer": [list(tokens) for tokens in self.tokens_per_layer],
            "stages": stages,
            "own_experts": list(self.own_experts),
            "expert_pairs": {str(layer): list(pairs) for layer, pairs in self.expert_pairs.items()},
            "experts_skipped": self.experts_skipped,
            "flops": {"dense": self.flops.dense, "reduced": self.flops.reduced, "saved": self.flops.saved},
            "skipped": self.skipped,
        }

    def __str__(self) -> str:
        f = self.flops
        lines = [
            f"prompt: {sum(self.n_vision)} vision + {sum(self.n_text)} text tokens in {len(self.n_text)} sample(s)",
            *(
                f"layer {s.layer:>3}: {sum(s.entering)} vision tokens -> {sum(s.kept)} kept + {sum(s.merged)} merged, "
                f"{sum(s.dropped)} dropped"
                for s in self.stages
            ),
            "tokens per layer: " + " ".join(str(sum(tokens)) for tokens in self.tokens_per_layer),
            f"language model FLOPs: {f.dense:.4g} dense, {f.reduced:.4g} now, {f.saved:.1%} saved",
        ]
        if self.expert_pairs:
            lines.append(f"experts skipped by need: {self.experts_skipped:.1%} of those chosen")
        if self.device in DEVICES:  # a CPU's ceilings would have to be measured first
            lines.append(time_line(self.time()))
        if self.own_experts:
            lines.append(f"the model's own experts, a row per token and expert, at {len(self.own_experts)} layers")
        if self.skipped:
            lines.append("skipped: fewer vision tokens than min_vision_tokens, the stock model ran")
        return "\n".join(lines)


def time_line(time: TimeReport) -> str:
    """Calculated seconds in a line."""
    return (
        f"language model on {time.ceilings.name}, floors by calculation, not measured: "
        f"{time.dense * 1e3:.1f} ms dense, {time.reduced * 1e3:.1f} now, x{time.speedup:.2f}"
    )


def report(model: nn.Module) -> PrefillReport:
    """Describe the last prefill with vision tokens. Reads the device; costs nothing until it is called.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: FastMMoE is not enabled on it, or no prefill with vision tokens has run since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    plan = plan_in_force(model)
    if plan is None:
        raise RuntimeError("model: FastMMoE is not enabled; call fastmmoe.enable(model, config) first")
    if plan.last is None:
        raise RuntimeError("model: no prefill with vision tokens has run since FastMMoE was enabled")
    text_model, segments = installation_of(model).text, plan.last
    text_config, architecture = text_model.config, architecture_of(text_model.config)
    weights = next(text_model.parameters())
    layout = segments[0].layout
    n_text = tuple(length - n for length, n in zip(layout.lengths, layout.n_vision, strict=True))
    config = FastMMoEConfig() if plan.skipped else plan.config
    prune_layers = config.prune_layers
    # other methods have no windows: what they merge is told by the token it stands at alone
    window = getattr(config, "window", 1)
    seen = [_segment(plan, layer) for layer in range(text_config.num_hidden_layers)]
    pairs = expert_pairs(plan, architecture)
    return PrefillReport(
        n_text=n_text,
        n_vision=layout.n_vision,
        tokens_per_layer=tuple(segment.layout.lengths for segment in seen),
        stages=_stages(segments, prune_layers, window),
        flops=flops(
            architecture,
            n_text,
            layout.n_vision,
            config,
            vision_left=[segment.layout.n_vision for segment in segments[1:]],
            expert_pairs=pairs,
        ),
        expert_pairs=pairs,
        own_experts=installation_of(model).own_experts(plan),
        skipped=plan.skipped,
        architecture=architecture,
        config=config,
        device=known_device(weights.device, weights.dtype),
    )


def expert_pairs(plan: Plan, architecture: Architecture) -> dict[int, tuple[int, int]]:
    """Layer -> pairs of text and of vision tokens with an expert in the last prefill, where the gates alone know."""
    found = {}
    for layer, ids in plan.chosen.items():
        segment = _segment(plan, layer)
        active, vision = (ids < architecture.num_experts).sum(-1), segment.vision_rows.flatten().to(ids.device)
        if len(ids) == len(vision):
            n_vision = int(active[vision].sum())
            found[layer] = int(active.sum()) - n_vision, n_vision
        else:  # a gate of vision tokens alone
            n_text = sum(segment.layout.lengths) - sum(segment.layout.n_vision)
            found[layer] = n_text * architecture.num_experts_per_tok, int(active.sum())
    return found


def _segment(plan: Plan, layer: int) -> Segment:
    """What a layer's MoE saw of the last prefill; behind a layer that is pruned behind, the next one's."""
    config = FastMMoEConfig() if plan.skipped else plan.config
    return plan.last[sum(first + config.prunes_behind_layer <= layer for first in config.prune_layers)]


def _stages(segments: list[Segment], layers: tuple[int, ...], window: int) -> tuple[StageReport, ...]:
    """Follow every vision token of the prompt through the stages."""
    # the prompt's vision tokens, per sample: positions in the input, and whether each is still there
    vision = [np.flatnonzero(row) for row in segments[0].layout.vision_mask.cpu().numpy()]
    stages = []
    for layer, before, after in zip(layers, segments, segments[1:], strict=False):
        is_stage = after is not before
        fates, merged = [], []
        for sample, tokens in enumerate(vision):
            entering = _positions(before, sample)
            survivors = _positions(after, sample)
            heads = survivors[after.merged[sample].cpu().numpy()] if is_stage else survivors[:0]
            fate = np.full(len(tokens), GONE, np.int8)
            fate[np.isin(tokens, entering)] = DROPPED
            fate[np.isin(tokens, survivors)] = KEPT
            if len(heads):
                windows = before.layout.windows(window)[sample]
                members = [entering[list(w)] for w in windows if entering[w[0]] in heads]
                fate[np.isin(tokens, np.concatenate(members))] = MERGED
            fates.append(fate)
            merged.append(len(heads))
        left = after.layout.n_vision
        stages.append(
            StageReport(
                layer=layer,
                entering=before.layout.n_vision,
                kept=tuple(n - m for n, m in zip(left, merged, strict=True)),
                merged=tuple(merged),
                dropped=tuple(n - m for n, m in zip(before.layout.n_vision, left, strict=True)),
                fate=tuple(fates),
            )
        )
    return tuple(stages)


def _positions(segment: Segment, sample: int) -> np.ndarray:
    """Position in the prompt of each token of a segment, padding included (-1)."""
    if segment.index is None:
        return np.where(segment.valid[sample].cpu().numpy(), np.arange(segment.valid.shape[1]), -1)
    return segment.index[sample].cpu().numpy()
