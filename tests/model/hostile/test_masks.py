"""4D attention masks, bool and additive: kept and cut to the survivors, or refused; never replaced by another one.

The expectation is the stock model, its gates' output edited for fewer experts, and the tokens to drop hidden by hand:
each layer behind a prune layer gets the same mask without the dropped tokens' columns. Which ones are dropped is found
from the stock model's eager attention weights.
"""

from functools import cache

import pytest
import torch

import fastmmoe

from ..tiny import tiny_internvl
from ..tiny_deepseek import tiny_deepseek_vl2
from .common import (
    CONFIGS,
    alone,
    batch_of,
    close,
    config_of,
    enabled_logits,
    fewer_experts_by_hand,
    fresh,
    generate,
    in_one_row,
    layers_of,
    logits_of,
    positions_of,
    stock_logits,
    vision_of,
)

SEED = {"internvl": 1, "deepseek": 3}  # of the batches: no choice of tokens is narrow, `drop_by_hand` checks it


@pytest.fixture(params=["bool", "additive"])
def form(request):
    return request.param


def causal(batch):
    """bool [B, n, n], true where a token is seen: causal, without padding, as transformers makes it."""
    n = batch["input_ids"].shape[1]
    return torch.ones(n, n, dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None]


def image_blocks(batch):
    """`causal`, and every vision token sees all of its own image's."""
    vision = vision_of(batch)
    begins = vision & ~torch.nn.functional.pad(vision, (1, 0))[:, :-1]
    image = begins.cumsum(1).masked_fill(~vision, 0)
    return causal(batch) | ((image[:, :, None] == image[:, None]) & vision[:, None])


def in_form(seen, form, dtype=torch.float32):
    """[B, n, n] or [B, H, n, n] -> what `attention_mask` takes."""
    seen = seen if seen.dim() == 4 else seen[:, None]
    return seen if form == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)


@cache
def drop_by_hand(family, images, kind, name):
    """(logits of the stock model that drops as the config `name` asks, without merging; who is there at the end).

    One forward per stage: eager attention weights up to a prune layer do not depend on what is dropped there.
    """
    batch = batch_of(family, images, seed=SEED[family])
    seen, attention = kind(batch), dict(attn_implementation="eager")
    model = tiny_internvl(**attention) if family == "internvl" else tiny_deepseek_vl2("base", **attention)
    stages = CONFIGS[name].get("prune_layers", ())
    ratio = CONFIGS[name]["retention"] ** (1 / len(stages)) if stages else 1.0
    there = batch["attention_mask"].bool()
    vision, last = vision_of(batch), [int(row.nonzero().max()) for row in there]
    masks = [seen] * len(layers_of(model))

    def cut(number):
        def hook(layer, args, kwargs):
            return args, kwargs | {"attention_mask": in_form(masks[number], "additive")}

        return hook

    for number, layer in enumerate(layers_of(model)):
        layer.register_forward_pre_hook(cut(number), with_kwargs=True)
    inputs = batch | {"attention_mask": in_form(seen, "additive")}
    with torch.no_grad(), fewer_experts_by_hand(model, vision, name):
        for stage in stages:
            weights = model(**inputs, output_attentions=True).attentions[stage].mean(1)
            there = there.clone()
            for sample, asking in enumerate(last):
                entering = (vision[sample] & there[sample]).nonzero().flatten()
                target = max(1, int(len(entering) * ratio))
                worth = weights[sample, asking, entering].sort(descending=True, stable=True)
                gap = (worth.values[target - 1] - worth.values[target]) / worth.values[0]
                assert gap > 1e-3, f"sample {sample}: a choice too narrow for float32 ({gap:.1e}), take another seed"
                there[sample, entering[worth.indices[target:]]] = False
            masks[stage + 1 :] = [seen & there[:, None]] * (len(masks) - stage - 1)
        return model(**inputs).logits, there


def masked(batch, mask, **others):
    return batch | {"attention_mask": mask} | others


# ------------------------------------------------------------------------------------------------ what a mask means


@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_with_padding_is_the_2d_mask(family, config, form, side):
    """In a prefill, and in a decode step on its cache."""
    batch = batch_of(family, padding_side=side)
    position = positions_of(batch["attention_mask"])
    longer = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    token = {"input_ids": torch.tensor([[5], [7]]), "position_ids": position.amax(1, keepdim=True) + 1}
    model = fresh(family)
    fastmmoe.enable(model, config_of(config))

    def run(mask, next_mask):
        with torch.no_grad():
            out = model(**masked(batch, mask, position_ids=position), use_cache=True)
            step = model(**token, attention_mask=next_mask, past_key_values=out.past_key_values, use_cache=True)
        fate = [[f.tolist() for f in stage.fate] for stage in fastmmoe.report(model).stages]
        return torch.cat((out.logits, step.logits), 1)[longer.bool()], fate

    want, fate = run(batch["attention_mask"], longer)
    next_mask = in_form(longer.bool()[:, None], form)
    for after in (longer, next_mask):
        got, other = run(in_form(causal(batch), form), after)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert other == fate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool])
def test_a_2d_mask_may_have_any_dtype(family, config, dtype):
    """Which stock models take as well."""
    batch = batch_of(family)
    model, inputs = fresh(family), masked(batch, batch["attention_mask"].to(dtype))
    assert torch.equal(logits_of(model, inputs), stock_logits(family))
    fastmmoe.enable(model, config_of(config))
    assert torch.equal(logits_of(model, inputs), enabled_logits(family, config))
    assert torch.equal(generate(model, inputs), generate(model, batch))


@pytest.mark.parametrize("images", [(2,), (1, 2)], ids=["one-sample", "left-padded"])
@pytest.mark.parametrize("kind", [causal, image_blocks])
def test_a_mask_is_kept_behind_prune_layers(family, config, form, kind, images):
    batch = batch_of(family, images, seed=SEED[family])
    seen = kind(batch)
    want, there = drop_by_hand(family, images, kind, config)
    model = fresh(family)
    merging = {} if config == "experts" else {"merge_ratio": 0.0}
    fastmmoe.enable(model, config_of(config, **merging))
    got = logits_of(model, masked(batch, in_form(seen, form)))
    text = there & ~vision_of(batch)
    close(got[text], want[text])
    for stage in fastmmoe.report(model).stages[-1:]:
        for fate, stays, vision in zip(stage.fate, there, vision_of(batch), strict=True):
            assert (fate == 0).tolist() == stays[vision].tolist()
    if kind is image_blocks:  # the mask matters
        model = fresh(family)
        fastmmoe.enable(model, config_of(config, **merging))
        assert (logits_of(model, batch)[text] - want[text]).abs().max() > 0.1


@pytest.mark.parametrize("images", [(1, 2), (2, 1)], ids=["longer-behind", "longer-in-front"])
def test_two_prompts_in_one_row(family, config, form, images):
    samples = alone(batch_of(family, images))
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    row = in_one_row(samples)
    seen = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool()[None]
    model = fresh(family)
    fastmmoe.enable(model, config_of(config))
    got = logits_of(model, row, attention_mask=in_form(seen, form), use_cache=False)
    for sample, end in zip(samples, (lengths[0], sum(lengths)), strict=True):
        close(got[0, end - 1], logits_of(model, sample)[0, -1])


@pytest.mark.parametrize("mask", ["per-head", "biased"])
def test_fewer_experts_need_no_mask_of_a_kind(family, mask):
    """Which tokens are vision tokens does not depend on who sees whom."""
    batch = batch_of(family, (2,))
    change = CHANGES[mask](in_form(causal(batch), "additive"))
    stock = fresh(family)
    with fewer_experts_by_hand(stock, vision_of(batch), "experts"):
        want = logits_of(stock, masked(batch, change))
    model = fresh(family)
    fastmmoe.enable(model, config_of("experts"))
    close(logits_of(model, masked(batch, change)), want)


# ------------------------------------------------------------------------------------------------ refused


def per_head(mask):
    """Each head but the first sees a window of the text only."""
    n, heads = mask.shape[-1], 4
    near = torch.ones(n, n, dtype=torch.bool).triu(-4)
    mask = mask.expand(-1, heads, -1, -1).clone()
    mask[:, 1:] = mask[:, 1:].masked_fill(~near, torch.finfo(mask.dtype).min)
    return mask


def biased(mask):
    """Farther tokens count less."""
    n = mask.shape[-1]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return mask - 0.1 * distance.clamp_min(0)


CHANGES = {"per-head": per_head, "biased": biased}


@pytest.mark.parametrize("name", ["both", "prune"])
@pytest.mark.parametrize("change", [*CHANGES, "several-prompts-in-several-rows"])
def test_what_pruning_cannot_follow_is_refused(family, name, change):
    batch = batch_of(family, (2,))
    if change in CHANGES:
        mask = CHANGES[change](in_form(causal(batch), "additive"))
    else:
        row = in_one_row([batch_of(family, (1,), seed=seed) for seed in (0, 1)])
        batch = {key: torch.cat([value, value]) for key, value in row.items()}
        n = row["input_ids"].shape[1] // 2
        mask = in_form(torch.block_diag(*[torch.ones(n, n).tril()] * 2).bool().expand(2, -1, -1), "bool")
    model = fresh(family)
    fastmmoe.enable(model, config_of(name))
    with torch.no_grad(), pytest.raises(ValueError, match="attention_mask"):
        model(**masked(batch, mask))
    # and nothing of it is left
    assert torch.equal(logits_of(model, batch_of(family)), enabled_logits(family, name))
