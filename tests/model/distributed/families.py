"""What every process of several does with every family's model: `torchrun -m model.distributed.families FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

import fastmmoe

from .. import tiny_families
from ..families import LOOPS
from ..test_parity_families import configs

SPLITS = {"tp": dict(tp_size=2), "ep": dict(tp_size=2, ep_size=2)}
# what transformers 5.23 cannot run so itself, or runs to something else than one process does
STOCK_FAILS = {
    "qwen3_vl_moe": ("tp", "ep"),  # of the layout in which it saves: see worker.py for the hub's
    "aria": ("tp",),
    "llama4": ("ep",),
    "minimax_m3_vl": ("tp",),
    "step3p7": ("tp",),
    "dots3_note": ("tp",),
    "muse_spark": ("tp", "ep"),
    "glm5_next": ("tp", "ep"),
}
# which experts are refused: they have a forward of their own
REFUSED = {"step3p7": "are split between processes by something else"}


def save(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint whose experts two processes can share, and a prompt."""
    model, inputs = tiny_families.FAMILIES[name]()
    text = model.config.get_text_config()
    key = "intermediate_size" if name in ("internvl_gpt_oss", "llama4") else "moe_intermediate_size"
    if hasattr(text, key):  # grouped_mm wants rows of multiples of 16 bytes in each half
        value = getattr(text, key)
        setattr(text, key, 24 if isinstance(value, int) else [24] * len(value))
    model = AutoModelForImageTextToText.from_config(model.config)
    tiny_families.randomise(model, 0)
    model.save_pretrained(folder)
    torch.save(inputs, folder / "inputs.pt")
    return inputs


def logits(model: nn.Module, name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | str]:
    """Setting -> logits, or what was said instead."""
    found = {}
    for case, config in {"stock": None, **configs(name)}.items():
        try:
            if config is not None:
                fastmmoe.enable(model, config)
            with torch.no_grad():
                found[case] = model(**inputs).logits
        except Exception as error:
            found[case] = f"{type(error).__name__}: {error}"
        fastmmoe.disable(model)
    return found


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    for name in LOOPS:
        inputs = torch.load(folder / name / "inputs.pt")
        for split, options in SPLITS.items():
            if split in STOCK_FAILS.get(name, ()):
                continue
            model = AutoModelForImageTextToText.from_pretrained(
                folder / name, dtype=torch.float32, distributed_config=DistributedConfig(**options)
            ).eval()
            torch.save(logits(model, name, inputs), folder / f"{name}-{split}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
