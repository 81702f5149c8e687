"""Attention of a sample's last token to all keys, averaged over heads (paper section 3.3; method section 2, step 3)."""

import torch

from fastmmoe_kernels.attention.reference import last_query_attention_reference
from fastmmoe_kernels.backend import resolve_backend
from fastmmoe_kernels.checks import FLOATS, check_float, check_tensor
from fastmmoe_kernels.library import register


def last_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    key_mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """One query row's softmax over the valid keys, mean over query heads (method section 2, step 3).

    Costs one pass over the keys and O(Hq n) memory, never an n x n matrix. Computed in float32; keys of any strides
    (slices of a cache, expanded heads) are read where they lie.

    A logit of -inf adds 0, as that of a masked key does, also where all are -inf. A logit of NaN or inf, from a head's
    query, its sink or a key that it reads, makes its shares of all other keys NaN. Masked keys stay 0; other samples do
    not change, unless by a sink. Equal keys, a query of zeros and denormals give equal shares.

    Args:
        query: float32, float16 or bfloat16 [B, Hq, D], the one query row that matters, position encoding applied.
        key: same dtype [B, Hkv, n, D], Hkv a divisor of Hq: query head h reads key head h // (Hq // Hkv).
        scale: positive factor of the logits, usually D ** -0.5.
        key_mask: bool [B, n], or [B, Hm, n] with Hm a divisor of Hq: query head h sees row h // (Hq // Hm). True at
            valid keys; None: all are valid. A key that is masked for a head does not enter that head's logits, whatever
            it holds; so keys masked for all heads that read them may hold anything, NaN included.
        sinks: float32, float16 or bfloat16 [Hq], a logit per query head (not scaled) that takes part in its softmax
            like one more key, but has no place in the result (`s_aux` in transformers); None: no sinks.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 [B, n], 0 at keys masked for all heads. A head's share of it sums to 1 / Hq, to less with a sink, and
        to 0 without a valid key: without sinks, a sample whose heads all have a valid key sums to 1.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype, device or range; names the argument.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    check_tensor("query", query, ("B", "Hq", "D"), FLOATS)
    batch_size, num_heads, head_dim = query.shape
    check_tensor("key", key, (batch_size, "Hkv", "n", head_dim), (query.dtype,), query.device)
    num_kv_heads, num_keys = key.shape[1:3]
    if num_kv_heads == 0 or num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"key: expected a number of heads that divides query's {num_heads}, got {num_kv_heads}")
    check_float("scale", scale, 0.0, float("inf"), low_open=True)
    if key_mask is not None:
        per_head = isinstance(key_mask, torch.Tensor) and key_mask.dim() == 3
        shape = (batch_size, "Hm", num_keys) if per_head else (batch_size, num_keys)
        check_tensor("key_mask", key_mask, shape, (torch.bool,), query.device)
        if per_head and (key_mask.shape[1] == 0 or num_heads % key_mask.shape[1]):
            raise ValueError(f"key_mask: expected rows that divide query's {num_heads} heads, got {key_mask.shape[1]}")
    if sinks is not None:
        check_tensor("sinks", sinks, (num_heads,), FLOATS, query.device)
    return _last_query_attention(query, key, key_mask, sinks, float(scale), resolve_backend(backend, query))


def _fake(query, key, key_mask, sinks, scale):
    return query.new_empty(key.shape[0], key.shape[2], dtype=torch.float32)


_last_query_attention = register(
    "last_query_attention",
    last_query_attention_reference,
    "fastmmoe_kernels.attention.kernel:last_query_attention_triton",
    _fake,
)
