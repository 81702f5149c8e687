"""Where the golden data of DeepSeek-VL2 lie: what the official code computed, see tests/data/deepseek_vl2/README.md.

The repository holds what the tests need to mean something alone. The whole set (three variants) lies beside a
checkout, in ../shared, on the machines that have it.
"""

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).parents[2]
PLACES = (REPOSITORY.parent / "shared/deepseek_vl2/golden", REPOSITORY / "tests/data/deepseek_vl2")
VARIANTS = ("tiny_like", "small_like", "base_like")
CASES = ("single_image", "multi_image", "batch_left_padded")


def golden(name: str) -> Path:
    """The golden file or directory of that name; skips the test where there is none, and fails it in CI."""
    for place in PLACES:
        if (place / name).exists():
            return place / name
    missing = f"no golden data {name}: it is not in the repository, and {PLACES[0]} does not exist"
    if os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)


def golden_case(variant: str, case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the model's inputs, what the official model made of them)."""
    tensors = load_file(golden(f"{variant}/case_{case}.safetensors"))
    inputs = {name.removeprefix("in."): t for name, t in tensors.items() if name.startswith("in.")}
    return inputs, {name.removeprefix("out."): t for name, t in tensors.items() if name.startswith("out.")}
