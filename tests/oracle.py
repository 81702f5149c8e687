"""The C++ reference (`csrc_ref/fastmmoe_ref.cpp`) for NumPy: float64 in, float64 out.

The definitions are in the C++ file; this module compiles it on first use, checks shapes, and passes pointers. Any mask
may be None: no vision tokens, no padding.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "csrc_ref" / "fastmmoe_ref.cpp"
# as in csrc_ref/Makefile
COMPILE = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-fPIC", "-shared"]

SCORING = {"softmax": 0, "sigmoid": 1}
ACTIVATION = {"silu": 0, "clamped_silu": 1, "silu_clamped": 2, "oai": 3, "gelu_tanh": 4, "relu2": 5}
STRATEGY = {"hybrid": 0, "routing_similarity": 1, "dynamic_attention": 2}
MERGE_METHOD = {"mlerp": 0, "mean": 1}


# --- routing ----------------------------------------------------------------------------------------------------------


class Routing(NamedTuple):
    ids: NDArray  # int32 [T, K], by falling selection score; unused slots hold E
    weights: NDArray  # [T, K]; unused slots hold 0
    probs: NDArray  # [T, E]
    score_gap: NDArray  # [T], in units of the selection score, as are the other gaps; infinite if nothing can flip
    group_gap: NDArray  # [T]
    order_gap: NDArray  # [T]
    skip_gap: NDArray  # [T], a share of the weight


def topk_routing(logits: ArrayLike, top_k: int, **options) -> tuple[NDArray, NDArray, NDArray]:
    """(ids, weights, probs) of `route`, with the same arguments."""
    return route(logits, top_k, **options)[:3]


def routing_margin(logits: ArrayLike, top_k: int, **options) -> tuple[NDArray, NDArray, NDArray]:
    """(score_gap, group_gap, order_gap) of `route`, with the same arguments: how close each token's choice was.

    `score_gap`: worst chosen minus best rejected expert (where weights are rescaled to the original top-K, also at K);
    `group_gap`: the same for groups; `order_gap`: smallest gap between neighbours among the chosen experts.
    """
    return route(logits, top_k, **options)[3:6]


def route(
    logits: ArrayLike,
    top_k: int,
    *,
    vision_mask: ArrayLike | None = None,
    padding_mask: ArrayLike | None = None,
    vision_top_k: int | None = None,
    skip_below: ArrayLike | None = None,
    exempt_mask: ArrayLike | None = None,
    vision_experts: ArrayLike | None = None,
    scoring: str = "softmax",
    norm_topk_prob: bool = True,
    correction_bias: ArrayLike | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_best: int | None = None,
    routed_scaling_factor: float = 1.0,
    renormalize: bool = True,
) -> Routing:
    """Routes tokens by logits [T, E]; tokens of vision_mask [T] get `vision_top_k` experts (None: `top_k`).

    Tokens of padding_mask [T] get none. Weights under skip_below [2], of text and of vision tokens, are skipped but in
    tokens of exempt_mask [T]; vision tokens choose among vision_experts [E]. A group's score is the sum of its
    `group_best` best experts' (None: of two with a correction bias, of one without).
    """
    logits = _floats(logits, "logits", (None, None))
    T, E = logits.shape
    vision_top_k = top_k if vision_top_k is None else vision_top_k
    mask = _mask(vision_mask, "vision_mask", (T,), default=False)
    padding = _mask(padding_mask, "padding_mask", (T,), default=False)
    exempt = _mask(exempt_mask, "exempt_mask", (T,), default=False)
    allowed = None if vision_experts is None else _mask(vision_experts, "vision_experts", (E,), default=True)
    skip_below = None if skip_below is None else _floats(skip_below, "skip_below", (2,))
    bias = None if correction_bias is None else _floats(correction_bias, "correction_bias", (E,))
    _require(1 <= vision_top_k <= top_k, f"vision_top_k={vision_top_k}, expected 1 to top_k={top_k}")
    _require(n_group >= 1 and E % n_group == 0, f"n_group={n_group} does not divide E={E}")
    _require(n_group == 1 or 1 <= topk_group <= n_group, f"topk_group={topk_group}, expected 1 to {n_group}")
    size = E // n_group
    if group_best is None:
        group_best = 1 if bias is None else min(2, size)
    _require(1 <= group_best <= size, f"group_best={group_best}, expected 1 to {size}")
    eligible = E if n_group == 1 else E // n_group * topk_group
    _require(top_k <= eligible, f"top_k={top_k}, but only {eligible} experts may be selected")

    ids = np.empty((T, top_k), np.int32)
    weights, probs = np.empty((T, top_k)), np.empty((T, E))
    score_gap, group_gap, order_gap, skip_gap = (np.empty(T) for _ in range(4))
    _call(
        "topk_routing", logits, mask, padding, skip_below, exempt, allowed, bias, T, E, top_k, vision_top_k,
        _int32(SCORING[scoring]), _int32(norm_topk_prob), n_group, topk_group, group_best,
        float(routed_scaling_factor), _int32(renormalize),
        ids, weights, probs, score_gap, group_gap, order_gap, skip_gap,
    )  # fmt: skip
    return Routing(ids, weights, probs, score_gap, group_gap, order_gap, skip_gap)


class Budget(NamedTuple):
    chosen: NDArray  # bool [E]
    gap: float  # by which share of the last one's demand it beats the next; infinite if there is nothing to confuse


def choose_experts(
    ids: ArrayLike, weights: ArrayLike, vision_mask: ArrayLike, *, num_experts: int, budget: int
) -> Budget:
    """The `budget` experts that the tokens of vision_mask [T] ask for most, by ids and weights [T, K]."""
    weights = _floats(weights, "weights", (None, None))
    T, K = weights.shape
    ids = np.ascontiguousarray(np.asarray(ids, np.int32))
    _require(ids.shape == (T, K), f"ids has shape {ids.shape}, expected {(T, K)}")
    _require(1 <= budget <= num_experts, f"budget={budget}, expected 1 to {num_experts}")
    mask = _mask(vision_mask, "vision_mask", (T,), default=False)
    chosen, gap = np.empty(num_experts, np.uint8), np.empty(1)
    _call("choose_experts", ids, weights, mask, T, K, num_experts, budget, chosen, gap)
    return Budget(chosen.astype(bool), float(gap[0]))


def gate_logits(
    hidden: ArrayLike, weight: ArrayLike, *, bias: ArrayLike | None = None, logit_scale: float = 1.0
) -> NDArray:
    """hidden [T, H] @ weight [E, H] transposed, plus bias [E], times the scale: [T, E]."""
    hidden = _floats(hidden, "hidden", (None, None))
    T, H = hidden.shape
    weight = _floats(weight, "weight", (None, H))
    E = weight.shape[0]
    bias = None if bias is None else _floats(bias, "bias", (E,))
    logits = np.empty((T, E))
    _call("gate_logits", hidden, weight, bias, float(logit_scale), T, H, E, logits)
    return logits


# --- experts and attention --------------------------------------------------------------------------------------------


def moe_experts(
    hidden: ArrayLike,
    gate_up_proj: ArrayLike,
    down_proj: ArrayLike,
    ids: ArrayLike,
    weights: ArrayLike,
    *,
    activation: str = "silu",
    limit: float | None = None,
    alpha: float = 1.702,
    gate_up_bias: ArrayLike | None = None,
    down_bias: ArrayLike | None = None,
    interleaved: bool = False,
) -> NDArray:
    """Sum over slots of weight * down(activate(gate(x), up(x))): [T, H]; a slot whose id is no expert is skipped.

    hidden [T, H], gate_up_proj [E, 2I, H] (gate rows first, or in turn with up rows where interleaved; "relu2": [E, I,
    H], no gate), down_proj [E, H, I], ids and weights [T, K], gate_up_bias one per row of gate_up_proj, down_bias
    [E, H].
    """
    hidden = _floats(hidden, "hidden", (None, None))
    T, H = hidden.shape
    down_proj = _floats(down_proj, "down_proj", (None, H, None))
    E, _, I = down_proj.shape  # noqa: E741
    rows = I if activation == "relu2" else 2 * I
    gate_up_proj = _floats(gate_up_proj, "gate_up_proj", (E, rows, H))
    gate_up_bias = None if gate_up_bias is None else _floats(gate_up_bias, "gate_up_bias", (E, rows))
    down_bias = None if down_bias is None else _floats(down_bias, "down_bias", (E, H))
    weights = _floats(weights, "weights", (T, None))
    ids = np.ascontiguousarray(ids, np.int32)
    _require(ids.shape == weights.shape, f"ids has shape {ids.shape}, expected {weights.shape}")
    output = np.empty((T, H))
    _call(
        "moe_experts", hidden, gate_up_proj, gate_up_bias, down_proj, down_bias, ids, weights, T, H, E, I,
        ids.shape[1], _int32(ACTIVATION[activation]), math.inf if limit is None else float(limit), float(alpha),
        _int32(interleaved), output,
    )  # fmt: skip
    return output


def last_query_attention(
    query: ArrayLike,
    key: ArrayLike,
    scale: float,
    key_mask: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
) -> NDArray:
    """Attention of one query to every valid key, mean over query heads: [B, n]; a head without a valid key gives 0.

    query [B, Hq, D], key [B, Hkv, n, D] (query head h reads key head h // (Hq / Hkv)); key_mask [B, n] or [B, Hm, n]
    (query head h sees row h // (Hq / Hm)); sinks [Hq], a score of each head's that has no place in the result.
    """
    query = _floats(query, "query", (None, None, None))
    B, Hq, D = query.shape
    key = _floats(key, "key", (B, None, None, D))
    _, Hkv, n, _ = key.shape
    _require(Hq % Hkv == 0, f"{Hkv} key heads do not divide {Hq} query heads")
    if np.ndim(key_mask) == 2:
        key_mask = np.expand_dims(key_mask, 1)
    Hm = 1 if key_mask is None else np.shape(key_mask)[1]
    _require(Hq % Hm == 0, f"{Hm} rows of key_mask do not divide {Hq} query heads")
    mask = _mask(key_mask, "key_mask", (B, Hm, n), default=True)
    sinks = _floats(np.full(Hq, -np.inf) if sinks is None else sinks, "sinks", (Hq,))
    probs = np.empty((B, n))
    _call("last_query_attention", query, key, mask, sinks, float(scale), B, Hq, Hkv, Hm, n, D, probs)
    return probs


# --- pruning ----------------------------------------------------------------------------------------------------------


def prune_plan(runs: Sequence[int], keep_ratio: float, merge_ratio: float, window: int) -> tuple[int, int]:
    """Lengths of one sample's vision runs -> (target, merged): vision tokens that survive, windows that merge."""
    lengths = np.ascontiguousarray(runs, np.int64).reshape(-1)
    _check_ratios(keep_ratio, merge_ratio, window)
    counts = np.empty(2, np.int64)
    _call("prune_plan", lengths, lengths.size, float(keep_ratio), float(merge_ratio), window, counts[:1], counts[1:])
    return int(counts[0]), int(counts[1])


def window_redundancy(
    probs: ArrayLike,
    importance: ArrayLike,
    vision_mask: ArrayLike | None,
    attention_mask: ArrayLike | None,
    *,
    window: int,
    alpha: float,
    strategy: str,
) -> tuple[NDArray, NDArray, NDArray]:
    """Routing similarity S, attention importance A, redundancy C of every window, in batch and sequence order.

    probs [B, n, E]; importance and the masks [B, n].
    """
    probs, importance, vision, valid = _scores(probs, importance, vision_mask, attention_mask)
    B, n, E = probs.shape
    _require(window >= 1, f"window={window}, expected at least 1")
    windows = _call("count_windows", vision, valid, B, n, window)
    S, A, C = np.empty(windows), np.empty(windows), np.empty(windows)
    _call(
        "window_redundancy", probs, importance, vision, valid, B, n, E, window, float(alpha),
        _int32(STRATEGY[strategy]), S, A, C,
    )  # fmt: skip
    return S, A, C


def selection_margin(
    probs: ArrayLike,
    importance: ArrayLike,
    vision_mask: ArrayLike | None,
    attention_mask: ArrayLike | None,
    *,
    keep_ratio: float,
    merge_ratio: float,
    window: int,
    alpha: float,
    strategy: str,
) -> tuple[NDArray, NDArray]:
    """How close each sample's selection in `prune_tokens` was: (window_margin, token_margin), each [B].

    C of the last merged minus the first other window; importance of the last kept minus the first dropped token
    (`|p|` under routing_similarity). Infinite where there is nothing to confuse.
    """
    probs, importance, vision, valid = _scores(probs, importance, vision_mask, attention_mask)
    B, n, E = probs.shape
    _check_ratios(keep_ratio, merge_ratio, window)
    window_margin, token_margin = np.empty(B), np.empty(B)
    _call(
        "selection_margin", probs, importance, vision, valid, B, n, E, float(keep_ratio), float(merge_ratio), window,
        float(alpha), _int32(STRATEGY[strategy]), window_margin, token_margin,
    )  # fmt: skip
    return window_margin, token_margin


def prune_tokens(
    hidden: ArrayLike,
    residual: ArrayLike,
    probs: ArrayLike,
    importance: ArrayLike,
    vision_mask: ArrayLike | None,
    attention_mask: ArrayLike | None,
    *,
    keep_ratio: float,
    merge_ratio: float,
    window: int,
    alpha: float,
    strategy: str,
    merge_method: str,
    padding_side: str = "left",
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """-> hidden, residual [B, n', H], index int64 [B, n'] (source position, -1 at padding), merged bool [B, n'].

    hidden and residual [B, n, H]; probs [B, n, E]; importance and the masks [B, n]. n' is the most tokens any sample
    has left; shorter ones are padded with zeros. A sample that is not pruned keeps all its valid tokens.
    """
    probs, importance, vision, valid = _scores(probs, importance, vision_mask, attention_mask)
    B, n, E = probs.shape
    hidden = _floats(hidden, "hidden", (B, n, None))
    residual = _floats(residual, "residual", hidden.shape)
    H = hidden.shape[2]
    _check_ratios(keep_ratio, merge_ratio, window)
    pad_left = {"left": True, "right": False}[padding_side]

    n_out = _call("pruned_length", vision, valid, B, n, float(keep_ratio), float(merge_ratio), window)
    out_hidden, out_residual = np.empty((B, n_out, H)), np.empty((B, n_out, H))
    index, merged = np.empty((B, n_out), np.int64), np.empty((B, n_out), np.uint8)
    _call(
        "prune_tokens", hidden, residual, probs, importance, vision, valid, B, n, H, E, float(keep_ratio),
        float(merge_ratio), window, float(alpha), _int32(STRATEGY[strategy]), _int32(MERGE_METHOD[merge_method]),
        _int32(pad_left), n_out, out_hidden, out_residual, index, merged,
    )  # fmt: skip
    return out_hidden, out_residual, index, merged.astype(bool)


def _scores(probs, importance, vision_mask, attention_mask):
    probs = _floats(probs, "probs", (None, None, None))
    B, n, _ = probs.shape
    importance = _floats(importance, "importance", (B, n))
    vision = _mask(vision_mask, "vision_mask", (B, n), default=False)
    valid = _mask(attention_mask, "attention_mask", (B, n), default=True)
    return probs, importance, vision, valid


def _check_ratios(keep_ratio, merge_ratio, window):
    _require(math.isfinite(keep_ratio) and keep_ratio >= 0, f"keep_ratio={keep_ratio}, expected 0 or more")
    _require(0 <= merge_ratio <= 1, f"merge_ratio={merge_ratio}, expected 0 to 1")
    _require(window >= 1, f"window={window}, expected at least 1")


# --- the library ------------------------------------------------------------------------------------------------------


@functools.cache
def _library() -> ctypes.CDLL:
    """Compiles the reference unless this source has been compiled before, and loads it."""
    compiler = os.environ.get("CXX", "g++").split()
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, COMPILE, platform.platform())).encode()).hexdigest()
    folder = REPOSITORY / "build" / "csrc_ref" / key[:16]
    library = folder / "libfastmmoe_ref.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # under a name of its own, then moved into place at once: another process may be doing the same.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / library.name
            result = subprocess.run([*compiler, *COMPILE, "-o", fresh, SOURCE], capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{SOURCE.name} does not compile:\n{result.stderr}")
            os.replace(fresh, library)
    loaded = ctypes.CDLL(str(library))
    loaded.fastmmoe_ref_count_windows.restype = ctypes.c_int64
    loaded.fastmmoe_ref_pruned_length.restype = ctypes.c_int64
    return loaded


# the one kind of int that is not int64_t in the C interface
_int32 = ctypes.c_int32


def _call(name: str, *arguments):
    """Calls fastmmoe_ref_<name>: arrays become pointers, None a null pointer, int int64_t, float double."""

    def convert(argument):
        if isinstance(argument, np.ndarray):
            return ctypes.c_void_p(argument.ctypes.data)
        if isinstance(argument, float):
            return ctypes.c_double(argument)
        if argument is None or isinstance(argument, ctypes.c_int32):
            return argument
        return ctypes.c_int64(argument)

    return getattr(_library(), f"fastmmoe_ref_{name}")(*map(convert, arguments))


def _floats(value: ArrayLike, name: str, shape: tuple[int | None, ...]) -> NDArray:
    """`value` as a contiguous float64 array; None in `shape` admits any size."""
    array = np.ascontiguousarray(value, np.float64)
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    _require(fits, f"{name} has shape {array.shape}, expected {shape}")
    return array


def _mask(value: ArrayLike | None, name: str, shape: tuple[int, ...], *, default: bool) -> NDArray:
    """`value` as one byte per token, 0 or 1; None means `default` everywhere."""
    array = np.full(shape, default) if value is None else np.asarray(value)
    _require(array.shape == shape, f"{name} has shape {array.shape}, expected {shape}")
    return np.ascontiguousarray(array.astype(bool).astype(np.uint8))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
