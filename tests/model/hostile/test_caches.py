"""Row operations on a cache whose vision tokens were pruned: what it knows of its rows moves along with them.

Two prompts of different lengths, left-padded; the expectation is each prompt alone, decoded on a cache without padding.
"""

import copy
import io
import pickle
from functools import cache

import pytest
import torch
from transformers import DynamicCache, StaticCache

import fastmmoe

from .common import alone, batch_of, close, config_of, fresh, layers_of, positions_of

STEPS = torch.tensor([[5, 6, 7], [11, 12, 13]])  # what each of the two prompts goes on with
PRUNES = ["both", "prune"]
OPERATIONS = {
    "none": (lambda kv: None, [0, 1]),
    "reorder": (lambda kv: kv.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "reorder-to-one": (lambda kv: kv.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    "select-both": (lambda kv: kv.batch_select_indices(torch.tensor([1, 0])), [1, 0]),
    "select-one": (lambda kv: kv.batch_select_indices(torch.tensor([0])), [0]),
    "select-other": (lambda kv: kv.batch_select_indices(torch.tensor([1])), [1]),
    "repeat": (lambda kv: kv.batch_repeat_interleave(2), [0, 0, 1, 1]),
}


@torch.no_grad()
def decode(model, cache, mask, tokens):
    """Logits [B, steps, vocabulary] of tokens decoded one by one behind a prompt of this mask, and the longer mask."""
    logits = []
    for token in tokens.T:
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        step = dict(input_ids=token[:, None], attention_mask=mask, position_ids=positions_of(mask)[:, -1:])
        logits.append(model(**step, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(logits, 1), mask


@torch.no_grad()
def prefilled(model, batch, cache=None):
    mask = batch["attention_mask"]
    return model(**batch, position_ids=positions_of(mask), past_key_values=cache, use_cache=True).past_key_values, mask


@cache
def expected(family, name):
    """[2, steps, vocabulary]: each prompt alone."""
    model = fresh(family)
    fastmmoe.enable(model, config_of(name))
    return torch.cat(
        [
            decode(model, *prefilled(model, sample), STEPS[row][None])[0]
            for row, sample in enumerate(alone(batch_of(family)))
        ]
    )


@pytest.fixture(params=PRUNES)
def config(request):
    return request.param


@pytest.fixture
def enabled(family, config):
    model = fresh(family)
    fastmmoe.enable(model, config_of(config))
    return model


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_that_move(enabled, family, config, operation):
    move, rows = OPERATIONS[operation]
    kv, mask = prefilled(enabled, batch_of(family))
    move(kv)
    close(decode(enabled, kv, mask[rows], STEPS[rows])[0], expected(family, config)[rows])


def test_rows_that_move_between_steps(enabled, family, config):
    """As beam search does."""
    want = expected(family, config)
    kv, mask = prefilled(enabled, batch_of(family))
    first, mask = decode(enabled, kv, mask, STEPS[:, :1])
    kv.reorder_cache(torch.tensor([1, 0]))
    second, mask = decode(enabled, kv, mask[[1, 0]], STEPS[[1, 0], 1:2])
    kv.batch_repeat_interleave(2)
    kv.batch_select_indices(torch.tensor([3, 0]))
    third, _ = decode(enabled, kv, mask[[1, 0]], STEPS[:, 2:])
    close(first, want[:, :1])
    close(second, want[[1, 0], 1:2])
    close(third, want[:, 2:])


def test_rows_that_move_in_a_static_cache(enabled, family, config):
    length = batch_of(family)["input_ids"].shape[1] + STEPS.shape[1]
    text_config = enabled.model.language_model.config
    kv, mask = prefilled(enabled, batch_of(family), StaticCache(config=text_config, max_cache_len=length))
    kv.reorder_cache(torch.tensor([1, 0]))
    close(decode(enabled, kv, mask[[1, 0]], STEPS[[1, 0]])[0], expected(family, config)[[1, 0]])


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda kv: pickle.loads(pickle.dumps(kv)),
    "torch.save": lambda kv: torch.load(_saved(kv), weights_only=False),
}


def _saved(kv):
    buffer = io.BytesIO()
    torch.save(kv, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_a_cache_of_its_own(enabled, family, config, how):
    want = expected(family, config)
    kv, mask = prefilled(enabled, batch_of(family))
    other = COPIES[how](kv)
    other.reorder_cache(torch.tensor([1, 0]))
    got, other_mask = decode(enabled, other, mask[[1, 0]], STEPS[[1, 0], :2])
    close(decode(enabled, kv, mask, STEPS)[0], want)
    close(got, want[[1, 0], :2])
    close(decode(enabled, other, other_mask, STEPS[[1, 0], 2:])[0], want[[1, 0], 2:])


def test_a_cache_made_anew_of_a_pruned_ones_tensors_is_refused(enabled, family, config):
    """In a decode step, and in a turn with another image: nothing tells any more which tokens it holds."""
    model, batch = enabled, batch_of(family)
    cache = model(**batch, use_cache=True).past_key_values
    longer = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.tensor([[5], [7]]), "attention_mask": longer}
    for inputs in (step, batch | {"attention_mask": batch["attention_mask"].repeat(1, 2)}):
        anew = DynamicCache()
        for number, layer in enumerate(cache.layers):
            anew.update(layer.keys.clone(), layer.values.clone(), number)
        with pytest.raises(RuntimeError, match="its layers hold .* which of them is not known"):
            model(**inputs, past_key_values=anew)


def test_a_pruned_cache_has_shorter_layers_behind(enabled, family):
    """What is moved above is what it is meant to be: caches of several lengths, with padding in them."""
    kv, mask = prefilled(enabled, batch_of(family))
    lengths = [kv.get_seq_length(layer) for layer in range(len(layers_of(enabled)))]
    assert lengths[0] == mask.shape[1] > lengths[2] > lengths[4] and mask.sum(1).unique().numel() == 2
