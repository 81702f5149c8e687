"""Models, prompts and expectations of every family of `tiny_families.py`, for the cases named `test_families_*`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

import fastmmoe
from fastmmoe import FastMMoEConfig

from .. import naive_loop, tiny_families
from ..families import LOOPS
from ..test_parity_families import extended, settings_of

FAMILIES = tuple(LOOPS)
PRUNING = tuple(name for name in LOOPS if LOOPS[name].prune_layers)
ONE, TWO = ((5, 6), (7, 8, 9)), ((5, 6, 31), (17, 18), (27, 28, 29, 30))  # text around one image, and around two
PLACEHOLDERS = [*range(tiny_families.IMAGE, tiny_families.VOCABULARY)]


@cache
def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A family's model, which every case leaves as it was, and a prompt."""
    return tiny_families.FAMILIES[name]()


def prompt(name: str, texts: tuple[tuple[int, ...], ...], seed: int = 1) -> dict[str, Tensor]:
    """One sample: texts with an image between each and the next."""
    one = built(name)[1]
    inside = slice(len(tiny_families.HEAD), -len(tiny_families.TAIL))
    generator = torch.Generator().manual_seed(seed)

    def around(texts_of: tuple[tuple[int, ...], ...], key: str) -> Tensor:
        image = one[key][0, inside].tolist()
        return torch.tensor([[*texts_of[0], *(token for text in texts_of[1:] for token in (*image, *text))]])

    inputs = {"input_ids": around(texts, "input_ids")}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for key, value in one.items():
        if key.endswith("token_type_ids"):
            inputs[key] = around(tuple((0,) * len(text) for text in texts), key)
        elif key not in inputs and len(texts) > 1:
            drawn = [torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
                     for _ in texts[1:]]  # fmt: skip
            inputs[key] = torch.cat(drawn)
    return inputs


def is_per_token(key: str) -> bool:
    return key in ("input_ids", "attention_mask") or key.endswith("token_type_ids")


def batch_of(samples: list[dict[str, Tensor]], side: str = "left") -> dict[str, Tensor]:
    """Samples, some of which may have no image, in one padded batch."""
    width = max(sample["input_ids"].shape[1] for sample in samples)
    batch: dict[str, list[Tensor]] = {}
    for sample in samples:
        for key, value in sample.items():
            if is_per_token(key):
                missing = width - value.shape[1]
                value = torch.nn.functional.pad(value, (missing, 0) if side == "left" else (0, missing))
            batch.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in batch.items()}


def placed(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With position ids, where a model needs them to tell padding from text."""
    if not LOOPS[name].positions:
        return inputs
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)}


def vision_of(name: str, inputs: dict[str, Tensor]) -> list[bool]:
    return [token in LOOPS[name].placeholders for token in inputs["input_ids"][0].tolist()]


def config_of(name: str, **changes) -> FastMMoEConfig:
    """Everything that a family can do, at once."""
    loop = LOOPS[name]
    given = dict(vision_top_k=2, reduction_layer=1) if loop.experts else {}
    if loop.prune_layers:
        given |= dict(prune_layers=loop.prune_layers, keep_ratios=(0.7, 0.6)[: len(loop.prune_layers)], merge_ratio=0.4)
    return FastMMoEConfig(**given | changes)


def text_of(name: str, model: nn.Module) -> nn.Module:
    return model.get_submodule(LOOPS[name].parts.text)


def tolerance(name: str) -> float:
    return max(1e-3, LOOPS[name].tolerance)


def loop_of(
    name: str, model: nn.Module, config: FastMMoEConfig, inputs: dict[str, Tensor], stretches: list[int] | None = None
) -> naive_loop.Loop:
    """The oracle on one sample, its answer included."""
    vision = vision_of(name, inputs)
    return naive_loop.run(model, LOOPS[name].parts, settings_of(config), inputs, vision, stretches or [len(vision)])


def generate(model: nn.Module, inputs: dict[str, Tensor], steps: int, **options):
    """Greedily, no placeholder and no end."""
    return model.generate(
        **inputs, do_sample=False, min_new_tokens=steps, max_new_tokens=steps, suppress_tokens=PLACEHOLDERS,
        return_dict_in_generate=True, output_logits=True, disable_compile=True, **options,
    )  # fmt: skip


def assert_decodes_as_the_oracle(
    name: str, model: nn.Module, config: FastMMoEConfig, inputs: dict[str, Tensor], steps: int, **options
) -> None:
    with fastmmoe.enabled(model, config):
        output = generate(model, inputs, steps, **options)
    n = inputs["input_ids"].shape[1]
    want = loop_of(name, model, config, extended(inputs, output.sequences[:, n:]), [n, *[1] * (steps - 1)])
    for got, expected in zip(output.logits, want.logits, strict=True):
        torch.testing.assert_close(got[0], expected[-1], rtol=0, atol=tolerance(name))
