"""What the cases share: models and batches of two families, three configs, and expectations that need no FastMMoE.

A model is a copy of one built once per family, a batch holds two prompts of one and two images, left-padded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

import fastmmoe
from fastmmoe import FastMMoEConfig

from ..tiny import IMAGE_TOKEN, TOKENS_PER_TILE, tiny_batch, tiny_internvl
from ..tiny_deepseek import tiny_deepseek_batch, tiny_deepseek_vl2

FAMILIES = ("internvl", "deepseek")
PRUNING = dict(prune_layers=(1, 3), retention=0.4, merge_ratio=0.3)
EXPERTS = dict(vision_top_k=2, reduction_layer=1)
CONFIGS = {"both": EXPERTS | PRUNING, "prune": PRUNING, "experts": EXPERTS}
CLOSE = dict(atol=1e-3, rtol=1e-3)  # other shapes or another order of summation; a wrong choice is off by 0.1 and more


def built(family: str) -> nn.Module:
    """A stock model that never ran; all of a family have the same weights."""
    return tiny_internvl() if family == "internvl" else tiny_deepseek_vl2("base")


@cache
def _never_run(family: str) -> nn.Module:
    return built(family)


@cache
def _original(family: str) -> nn.Module:
    model = built(family)
    # the first forward is where transformers puts hooks of its own on a model
    logits_of(model, batch_of(family))
    return model


def fresh(family: str) -> nn.Module:
    """A stock model that has run before."""
    return copy.deepcopy(_original(family))


def config_of(name: str, **changes) -> FastMMoEConfig:
    return FastMMoEConfig(**CONFIGS[name] | changes)


def batch_of(family: str, images: tuple[int, ...] = (1, 2), **options) -> dict[str, Tensor]:
    """`images` per sample; of DeepSeek-VL2's, every second one is two tiles wide."""
    if family == "internvl":
        return tiny_batch(_never_run(family), images, **options)  # of which only the config is read
    return tiny_deepseek_batch([[(1, 1), (2, 1)][:count] for count in images], **options)


def words(family: str) -> dict[str, Tensor]:
    """A prompt of text alone."""
    return {"input_ids": batch_of(family)["input_ids"][:1, -5:], "attention_mask": torch.ones(1, 5, dtype=torch.long)}


def alone(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every sample of a batch by itself, without padding."""
    samples, used = [], 0
    for row, valid in enumerate(batch["attention_mask"].bool()):
        ids = batch["input_ids"][row][valid][None]
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "images" in batch:
            sample |= {name: batch[name][row : row + 1] for name in ("images", "images_spatial_crop")}
            sample["images_seq_mask"] = batch["images_seq_mask"][row][valid][None]
        else:
            images = int((ids == IMAGE_TOKEN).sum()) // TOKENS_PER_TILE
            sample["pixel_values"] = batch["pixel_values"][used : used + images]
            used += images
        samples.append(sample)
    return samples


def in_one_row(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples one behind the other in a single row, positions beginning anew; the attention mask is the caller's."""
    row = {"position_ids": torch.cat([torch.arange(s["input_ids"].shape[1]) for s in samples])[None]}
    row["input_ids"] = torch.cat([sample["input_ids"] for sample in samples], 1)
    if "pixel_values" in samples[0]:
        return row | {"pixel_values": torch.cat([sample["pixel_values"] for sample in samples])}
    row["images_seq_mask"] = torch.cat([sample["images_seq_mask"] for sample in samples], 1)
    crops = [sample["images_spatial_crop"][sample["images_spatial_crop"].all(-1)] for sample in samples]
    tiles = [s["images"][0, : sum(1 + w * h for w, h in crop.tolist())] for s, crop in zip(samples, crops, strict=True)]
    return row | {"images": torch.cat(tiles)[None], "images_spatial_crop": torch.cat(crops)[None]}


def vision_of(batch: dict[str, Tensor]) -> Tensor:
    """bool [B, n], the vision tokens."""
    return batch["input_ids"] == IMAGE_TOKEN


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.model.language_model.layers


@torch.no_grad()
def logits_of(model: Callable, batch: dict[str, Tensor], **options) -> Tensor:
    return model(**batch, **options).logits


def generate(model, batch: dict[str, Tensor], steps: int = 4, **options) -> Tensor:
    """The tokens decoded greedily; no end-of-sequence token ends them early."""
    options = dict(do_sample=False, max_new_tokens=steps, eos_token_id=None) | options
    return model.generate(**batch, **options)[:, -steps:]


@cache
def stock_logits(family: str) -> Tensor:
    """Of `batch_of(family)`."""
    return logits_of(fresh(family), batch_of(family))


@cache
def enabled_logits(family: str, name: str) -> Tensor:
    """Of `batch_of(family)`, from a model that only this function ever touches."""
    model = fresh(family)
    fastmmoe.enable(model, config_of(name))
    got = logits_of(model, batch_of(family))
    assert (got[:, -1] - stock_logits(family)[:, -1]).abs().max() > 0.1, "enabling had no effect"
    return got


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, **CLOSE)


def same(got: Tensor, want: Tensor) -> None:
    """But for the order in which a gate's products are summed: by the kernel, or by the gate itself."""
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ nothing left behind


def state_of(model: nn.Module) -> dict[str, tuple]:
    """What could be put on a model's modules, in a form that compares: class, attributes, hooks, children."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")
    return {
        name: (
            type(module),
            {key: id(value) for key, value in vars(module).items() if key not in _CHANGING},
            {key: [id(hook) for hook in getattr(module, key).values()] for key in hooks},
            {key: id(value) for key, value in module._modules.items()},
        )
        for name, module in model.named_modules()
    }


# values that any forward may replace, or containers whose contents are compared instead
_CHANGING = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def assert_stock(model: nn.Module, family: str, before: dict[str, tuple] | None = None) -> None:
    """Stock bit for bit, in a prefill and in decoding, and no trace on any module of what was there."""
    assert torch.equal(logits_of(model, batch_of(family)), stock_logits(family))
    assert torch.equal(generate(model, batch_of(family), 2), _stock_tokens(family))
    if before is not None:
        after = state_of(model)
        assert after.keys() == before.keys()
        assert [name for name in after if after[name] != before[name]] == []


@cache
def _stock_tokens(family: str) -> Tensor:
    return generate(fresh(family), batch_of(family), 2)


# ------------------------------------------------------------------------------------------------ the method by hand


def route(gate: nn.Module, logits: Tensor, vision: Tensor, k_v: int) -> tuple[Tensor, Tensor]:
    """(weights, ids) [T, K] of tokens whose gate has these logits [T, E]; vision tokens' last K - k_v weigh nothing."""
    scores = logits.sigmoid() if getattr(gate, "scoring_func", "") == "sigmoid" else logits.softmax(-1)
    bias = getattr(gate, "e_score_correction_bias", None)
    ids = (scores if bias is None else scores + bias).topk(gate.top_k).indices
    unused = vision[:, None] & (torch.arange(gate.top_k) >= k_v)
    weights = scores.gather(1, ids).masked_fill(unused, 0.0)
    return weights / weights.sum(1, keepdim=True) * float(getattr(gate, "routed_scaling_factor", 1.0)), ids


@contextmanager
def fewer_experts_by_hand(model: nn.Module, vision: Tensor, name: str) -> Iterator[None]:
    """On a stock model: change what its gates return for a prompt's vision tokens [B, n], as the config `name` asks."""
    k_v, first = CONFIGS[name].get("vision_top_k"), CONFIGS[name].get("reduction_layer")

    def hook(gate: nn.Module, args: tuple, output: tuple) -> tuple | None:
        if len(output[0]) != vision.numel():  # a decode step
            return None
        return output[0], *route(gate, output[0], vision.flatten(), k_v)

    gates = [layer.mlp.gate for layer in layers_of(model)[first:] if hasattr(layer.mlp, "gate")] if k_v else []
    handles = [gate.register_forward_hook(hook) for gate in gates]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
