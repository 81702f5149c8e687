"""Floating-point operations of a language model's prefill, dense and with FastMMoE (method section 3).

The convention, in which a multiply-add counts 2:

- A matrix counts once per token that it multiplies: projections, gates of attention and of shared experts, dense MLPs,
  shared experts, routers, what mixes residual streams. A short convolution counts its kernel once per channel.
- Attention scores and values count the causal half, `2 n^2 heads head_dim`. Where a query sees a window of `w < n` keys
  they count `(2 n w - w^2)` in place of `n^2`, and where tokens see only their own chunk, the sum over chunks of
  `chunk^2`. Blocks of an image that are seen both ways count as if causal.
- Latent attention (MLA) counts as transformers computes it in a prefill, every head's keys and values written out.
- Attention to keys that an indexer chose counts as transformers computes it: as full attention, under a mask. The
  indexer's projections are added, and the causal half of its scores, with one key for each pool of tokens.
- Linear attention and state spaces count the recurrence whatever the kernel's chunks: per token and head a multiply-add
  per element of the state for each product with it, three for the delta rule (what the state predicts, the update,
  the output), two for Mamba (the update, the output). Decay is left out.
- Experts count what routing asks for, K per token, also where a stock model runs all of them. Where vision tokens have
  experts of their own, theirs count.
- Norms, activations, rotary embeddings, embeddings added in layers, the language head and FastMMoE's own scoring (one
  attention row and one gate pass per prune layer, under 0.1 % of a 30B model's total) are left out, and so is the
  vision tower. The scoring of other methods (rows of attention, ranks, clusters) is left out as well; tokens that they
  recycle are counted.

Behind a prune layer every later layer, of whatever kind, sees the tokens that are left; windows and chunks are then of
those.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmmoe.config import ReductionConfig
from fastmmoe.cost.tokens import count_tokens


@dataclass(frozen=True)
class LayerFlops:
    """One decoder layer; tokens are summed over the batch.

    Attributes:
        layer: counted from 0.
        attention_tokens: tokens the reduced layer's attention sees.
        moe_tokens: tokens its MoE (or dense MLP) sees: fewer than `attention_tokens` where tokens are pruned in front
            of the MoE.
        dense: FLOPs of the unchanged model's layer.
        reduced: FLOPs of the layer under the config.
    """

    layer: int
    attention_tokens: int
    moe_tokens: int
    dense: float
    reduced: float


@dataclass(frozen=True)
class FlopsReport:
    """FLOPs of one prefill of the language model, in FLOPs (not TFLOPs), summed over the batch.

    Attributes:
        dense: the unchanged model's.
        reduced: under the config.
        saved: `1 - reduced / dense`, a fraction.
        per_layer: one entry per decoder layer.
    """

    dense: float
    reduced: float
    saved: float
    per_layer: tuple[LayerFlops, ...]


def flops(
    text_config: Any,
    n_text: int | Sequence[int],
    n_vision: int | Sequence[int],
    config: ReductionConfig,
    *,
    vision_left: Sequence[Sequence[int]] | None = None,
    expert_pairs: Mapping[int, tuple[int, int]] | None = None,
) -> FlopsReport:
    """Count the FLOPs of one prefill of the language model, dense and under `config` (method section 3).

    Args:
        text_config: a transformers config (a composite one's text config is taken) or model, an `Architecture`, or
            the name of one in `ARCHITECTURES`, or a hub id that begins with one.
        n_text: text tokens of one sample, or of every sample of a batch.
        n_vision: vision tokens, likewise.
        config: what is reduced: a `FastMMoEConfig` or a baseline's.
        vision_left: per prune layer, the vision tokens of each sample behind it, as they were measured; None counts
            them from `config`, which counts that depend on the data do not allow, and nothing is reduced for fewer
            than `config.min_vision_tokens`.
        expert_pairs: layer -> pairs of a token and an expert that ran, of text and of vision tokens over the whole
            batch, as they were measured; of other layers all that may run are counted. Where experts are skipped by
            what a token needs, the count without is an upper bound.

    Raises:
        TypeError, ValueError: an unknown name or architecture, token counts that are no counts, do not pair up or
            are all zero, or a config that does not fit the model.
    """
    tokens = count_tokens(text_config, n_text, n_vision, config, vision_left, expert_pairs)
    text, vision, top_k = tokens.text, tokens.vision, tokens.architecture.num_experts_per_tok
    whole = vision, sum(vision), sum(text) * top_k, sum(vision) * top_k
    layers = tokens.architecture.layers
    per_layer = tuple(
        LayerFlops(
            layer=seen.layer,
            attention_tokens=sum(text) + sum(seen.before),
            moe_tokens=sum(text) + sum(seen.after),
            dense=float(layers[seen.layer].flops(text, *whole)),
            reduced=float(
                layers[seen.layer].flops(text, seen.before, sum(seen.after), seen.text_pairs, seen.vision_pairs)
            ),
        )
        for seen in tokens.layers
    )
    dense = sum(layer.dense for layer in per_layer)
    reduced = sum(layer.reduced for layer in per_layer)
    return FlopsReport(dense, reduced, 1.0 - reduced / dense, per_layer)
