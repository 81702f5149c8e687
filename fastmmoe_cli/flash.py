"""Which flash attention a model would take on this machine: an installed package, or kernels from the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX, FLASH_ATTN_KERNEL_FALLBACK
from transformers.utils import is_kernels_available

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AMPERE = 8  # compute capability from which there are kernels, where transformers names none
FROM_HUB = "from the hub, when a model asks for it"


def offered(capability: int | None) -> dict[str, str]:
    """Values of `attn_implementation` that transformers can serve here -> where it takes the kernels from.

    Args:
        capability: major compute capability of the GPU; None: there is none.
    """
    found = {}
    for version, needs in FLASH_ATTENTION_COMPATIBILITY_MATRIX.items() if capability is not None else ():
        name = f"flash_attention_{version}"
        if capability < needs.get("cuda_min_major_version", AMPERE):
            continue
        if needs["general_availability_check"]():
            found[name] = "installed"
        elif is_kernels_available() and name in FLASH_ATTN_KERNEL_FALLBACK:
            found[name] = f"{FLASH_ATTN_KERNEL_FALLBACK[name]}, {FROM_HUB}"
    return found


def taken(config: PreTrainedConfig, offers: dict[str, str]) -> dict[str, str]:
    """Of `offered`, what transformers' model with this config takes; some name kernels of their own in its place.

    Raises:
        ValueError: transformers has no such model.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    for part in model.modules() if offers else ():
        if not isinstance(part, PreTrainedModel):
            continue
        if own := getattr(part, "_compatible_flash_implementations", None):
            from_hub = [name for name in own if "flash" in name and "/" in name and is_kernels_available()]
            offers = {name: offers.get(name, FROM_HUB) for name in own if name in offers or name in from_hub}
        elif not part._supports_flash_attn:
            return {}
    return offers
