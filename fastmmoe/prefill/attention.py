"""See the attention of a prune layer, whichever implementation the model uses (method section 2.3).

An attention module asks its config for the implementation to call. At a prune layer the answer, in front of a prune
stage, is a name that equals the real one, for code that branches on it, and under which a function of ours is found: it
hands on what the real one gets, and then calls it.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastmmoe.families.kinds import FULL
from fastmmoe.methods.method import AttentionCall
from fastmmoe.prefill.masks import visible_pairs
from fastmmoe.prefill.patch import ConfigPatch
from fastmmoe.prefill.running import RUNNING
from fastmmoe.prefill.sequence import ForwardPass


class _OtherKey(str):
    __slots__ = ()
    __eq__ = str.__eq__

    def __hash__(self) -> int:
        return hash(("fastmmoe", str(self)))


class CapturingName(_OtherKey):
    """Equal to the name of an attention implementation, but another key in a dict.

    torch.compile of torch 2.11 refuses a class with a hash of its own, not one that inherits it, and takes only one and
    the same object for the same key.
    """

    __slots__ = ()


_NAMES: dict[str, CapturingName] = {}


def capturing_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Look at query [B, Hq, n, D] and key [B, Hkv, kv, D], then run the model's own attention."""
    # from here on the config gives the real answer: flash attention reads `module.config._attn_implementation` again
    _look(RUNNING.forward, query, key, kwargs["scaling"], attention_mask, kwargs.get("s_aux"))
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, _eager_of(type(module)))
    return attend(module, query, key, value, attention_mask, **kwargs)


def _eager_of(kind: type) -> Any:
    """The eager attention that stands beside an attention module's class, or beside the one it was made from."""
    for base in kind.__mro__:
        eager = getattr(sys.modules[base.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager
    return None


class AttentionPatch(ConfigPatch):
    """Gives the attention module of a prune layer a name for its implementation under which ours is found."""

    part = "attention"
    attribute = "_attn_implementation"

    def computed(self, value: Any) -> Any:
        forward = RUNNING.forward
        if not self.live or forward is None or forward.installation is not self.installation:
            return value
        stage = forward.stage
        if stage is None or stage.seen is not None or not forward.plan.pruning.looks:
            return value
        return _NAMES.get(value, value)


def register_capture(implementation: str) -> None:
    """Let the capturing name of an implementation be found."""
    if implementation not in _NAMES:
        name = _NAMES[implementation] = CapturingName(implementation)
        ALL_ATTENTION_FUNCTIONS.register(name, capturing_attention)


def _look(
    forward: ForwardPass,
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    attention_mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """Let the pruning look at a prune layer's attention."""
    behind, packing = len(forward.segments) - 1, forward.segments[-1].packing
    if query.dtype != key.dtype:
        # autocast leaves what it did not multiply in the type it had
        common = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(common), key.to(common)
    mask = None if forward.is_full(behind) else forward.key_mask(behind, key.device)
    # a static cache is longer than its contents
    keys = forward.key_count(behind)
    if forward.stage.kind == FULL:
        visible = forward.visible(behind, key.device)
    elif forward.text_config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"model: expected attn_implementation 'eager' or 'sdpa', whose masks say which keys a token of a "
            f"{forward.stage.kind} layer sees, got {str(forward.text_config._attn_implementation)!r}"
        )
    elif attention_mask is None:
        visible = None
    else:
        # the layer itself chose which keys each token sees
        visible = visible_pairs(attention_mask[..., :keys]).expand(query.shape[0], -1, -1, -1)
    if packing is not None:
        query, key = packing.pad(query, dim=2), packing.pad(key, dim=2)
        visible = None if visible is None else packing.pad_pairs(visible)
    key = key[:, :, :keys]
    layout = forward.segments[-1].layout.to(query.device)
    call = AttentionCall(query, key, scale, layout, mask, visible, sinks, forward.back)
    seen = forward.plan.pruning.look(call)
    group = forward.plan.head_groups.get(forward.stage.number)
    if group is not None:
        # means over as many heads each: every process goes on with the same mean over all of them
        seen = seen.contiguous()
        dist.all_reduce(seen, group=group)
        seen = seen / dist.get_world_size(group)
    forward.stage.seen = seen
