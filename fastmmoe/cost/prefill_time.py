"""Seconds of a language model's prefill, dense and with FastMMoE, by calculation: floors, not predictions.

Every op of a layer (`ops.py`) takes the time of its FLOPs or the time of its bytes at a device's ceilings
(`devices.py`), whichever is longer, one op after the other. Where the host takes longer to launch a layer than the
device to run it, the layer takes its launches' time. Real kernels stay below the ceilings, and what is left out
(embeddings, the language head, the vision tower, padding, copies that an implementation could do without) is added: a
measurement in eager mode is longer. Only elementwise ops may take less, where they are fused. Both sides of a
comparison are such floors of the same ops, so that their ratio is closer to the measured one than they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmmoe.config import ReductionConfig
from fastmmoe.cost.devices import Ceilings, ceilings_of
from fastmmoe.cost.ops import Op, layer_ops
from fastmmoe.cost.tokens import count_tokens


@dataclass(frozen=True)
class OpTime(Op):
    """An op with its time.

    Attributes:
        seconds: the floor.
        binds: what it is the time of: "flops", "bytes", or "launches" of the whole layer.
    """

    seconds: float
    binds: str


@dataclass(frozen=True)
class LayerTime:
    """One decoder layer; tokens are summed over the batch.

    Attributes:
        layer: counted from 0.
        attention_tokens, moe_tokens: tokens that the reduced layer's attention and its MoE (or dense MLP) see.
        dense: seconds of the unchanged model's layer, the sum of `dense_ops`.
        reduced: seconds of the layer under the config, the sum of `reduced_ops`.
        dense_ops, reduced_ops: its ops, in order.
    """

    layer: int
    attention_tokens: int
    moe_tokens: int
    dense: float
    reduced: float
    dense_ops: tuple[OpTime, ...]
    reduced_ops: tuple[OpTime, ...]


@dataclass(frozen=True)
class TimeReport:
    """Calculated seconds of one prefill of the language model, over the whole batch.

    Attributes:
        dense: the unchanged model's.
        reduced: under the config.
        speedup: `dense / reduced`.
        per_layer: one entry per decoder layer.
        ceilings: the device's.
    """

    dense: float
    reduced: float
    speedup: float
    per_layer: tuple[LayerTime, ...]
    ceilings: Ceilings


def prefill_time(
    text_config: Any,
    n_text: int | Sequence[int],
    n_vision: int | Sequence[int],
    config: ReductionConfig,
    device: str | Path | Ceilings = "h100",
    *,
    vision_left: Sequence[Sequence[int]] | None = None,
    expert_pairs: Mapping[int, tuple[int, int]] | None = None,
) -> TimeReport:
    """Calculate the floor of one prefill's time, dense and under `config`: not a measurement.

    Args:
        text_config, n_text, n_vision, config, vision_left, expert_pairs: as in `fastmmoe.flops`.
        device: h100, h200, a100, l40s or mi300x, by public figures of their 16-bit rates; "cpu", in float32 with
            torch's present number of threads, measured in half a second, once per process; or a .json file that
            holds measured `Ceilings`.

    Raises:
        TypeError, ValueError: as in `fastmmoe.flops`, an unknown device, or a file that holds no ceilings.
        OSError: a file that cannot be read.
    """
    tokens = count_tokens(text_config, n_text, n_vision, config, vision_left, expert_pairs)
    architecture, text, vision = tokens.architecture, tokens.text, tokens.vision
    ceilings = ceilings_of(device)

    def timed(layer: int, *seen: Any) -> tuple[OpTime, ...]:
        return _time(layer_ops(architecture, architecture.layers[layer], text, *seen, ceilings.itemsize), ceilings)

    top_k = architecture.num_experts_per_tok
    whole = vision, vision, sum(text) * top_k, sum(vision) * top_k, None, False
    per_layer = []
    for seen in tokens.layers:
        dense = timed(seen.layer, *whole)
        pairs = seen.text_pairs, seen.vision_pairs, seen.vision_experts
        reduced = timed(seen.layer, seen.before, seen.after, *pairs, seen.prunes)
        per_layer.append(
            LayerTime(
                layer=seen.layer,
                attention_tokens=sum(text) + sum(seen.before),
                moe_tokens=sum(text) + sum(seen.after),
                dense=sum(op.seconds for op in dense),
                reduced=sum(op.seconds for op in reduced),
                dense_ops=dense,
                reduced_ops=reduced,
            )
        )
    dense = sum(layer.dense for layer in per_layer)
    reduced = sum(layer.reduced for layer in per_layer)
    return TimeReport(dense, reduced, dense / reduced, tuple(per_layer), ceilings)


def _time(ops: Sequence[Op], ceilings: Ceilings) -> tuple[OpTime, ...]:
    """The ops of one layer, with what binds each of them."""
    rates = [(op.flops / ceilings.flops, op.bytes / ceilings.bytes) for op in ops]
    is_launch_bound = sum(map(max, rates)) < ceilings.launch * sum(op.launches for op in ops)
    timed = []
    for op, (by_flops, by_bytes) in zip(ops, rates, strict=True):
        if is_launch_bound:
            seconds, binds = op.launches * ceilings.launch, "launches"
        else:
            seconds, binds = max((by_flops, "flops"), (by_bytes, "bytes"))
        timed.append(OpTime(op.name, op.flops, op.bytes, op.weight_bytes, op.launches, seconds, binds))
    return tuple(timed)
