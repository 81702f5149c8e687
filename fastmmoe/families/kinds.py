"""What kind of attention a decoder layer has, by the names that transformers' configs use."""

from typing import Any

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
# layers that carry a state along the sequence in place of keys and values
RECURRENT = ("linear_attention", "conv")


def layer_kind(text_config: Any, layer: int) -> str:
    """`layer_types[layer]`; configs without them have one kind for all layers."""
    kinds = getattr(text_config, "layer_types", None)
    if kinds:
        return kinds[layer]
    return FULL if getattr(text_config, "sliding_window", None) is None else SLIDING


def layer_kinds(text_config: Any) -> list[str]:
    """The kind of every decoder layer."""
    return [layer_kind(text_config, layer) for layer in range(text_config.num_hidden_layers)]
