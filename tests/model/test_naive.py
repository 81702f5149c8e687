"""The oracle itself: equal to transformers where the method changes nothing, and to hand-made cases where it does."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from . import naive
from .naive import Settings
from .tiny import IMAGE_TOKEN, TOKENS_PER_TILE, tiny_batch, tiny_internvl

PRUNE = Settings(prune_layers=(1, 3), stage_keep_ratios=(0.7, 0.7), merge_ratio=0.2)


@cache
def model_and_batch():
    model = tiny_internvl()
    return model, tiny_batch(model)


@cache
def pruned():
    return naive.prefill(*model_and_batch(), PRUNE)


def alone(batch, sample):
    """One row of a left-padded batch without its padding, and the pictures that belong to it."""
    images = [int((ids == IMAGE_TOKEN).sum()) // TOKENS_PER_TILE for ids in batch["input_ids"]]
    start = int((batch["attention_mask"][sample] == 0).sum())
    row = {name: batch[name][sample : sample + 1, start:] for name in ("input_ids", "attention_mask")}
    return row | {"pixel_values": batch["pixel_values"][sum(images[:sample]) : sum(images[: sample + 1])]}


def words_of(batch, sample):
    return batch["input_ids"][sample][batch["attention_mask"][sample].bool()]


# settings that change nothing: transformers is the reference


@pytest.mark.parametrize("overrides", [{}, {"norm_topk_prob": False}, {"mlp_only_layers": [1]}], ids=str)
@pytest.mark.parametrize("images", [(1, 2), (2, 0, 1)], ids=str)
def test_equals_transformers_when_nothing_changes(images, overrides):
    model = tiny_internvl(**overrides)
    batch = tiny_batch(model, images)
    with torch.no_grad():
        logits = model(**batch).logits
    for sample, want in enumerate(naive.prefill(model, batch, Settings())):
        got = logits[sample][batch["attention_mask"][sample].bool()].double()
        torch.testing.assert_close(got, want.logits, atol=1e-4, rtol=1e-4)
        assert want.positions == tuple(range(len(got)))

    out = model.generate(**batch, do_sample=False, max_new_tokens=8, return_dict_in_generate=True, output_logits=True)
    for sample, want in enumerate(naive.greedy(model, batch, Settings(), 8)):
        assert want.margins["logits"] > 1e-3, "a seed whose best two tokens nearly tie cannot tell right from wrong"
        assert out.sequences[sample, -8:].tolist() == want.ids
        got = torch.stack([step[sample] for step in out.logits]).double()
        torch.testing.assert_close(got, want.logits, atol=1e-4, rtol=1e-4)


def test_float32_agrees_with_float64():
    model, batch = model_and_batch()
    for single, double in zip(naive.prefill(model, batch, PRUNE, torch.float32), pruned(), strict=True):
        assert single.stages == double.stages
        torch.testing.assert_close(single.logits.double(), double.logits, atol=1e-4, rtol=1e-4)


def test_log_probability_is_that_of_transformers():
    model, batch = model_and_batch()
    ids = [[3, 40, 7], [99, 2, 64]]
    for sample, got in enumerate(naive.log_probability(model, batch, Settings(), ids)):
        row = alone(batch, sample)
        row["input_ids"] = torch.cat([row["input_ids"], torch.tensor(ids[sample : sample + 1])], dim=1)
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        with torch.no_grad():
            steps = model(**row).logits[0, -4:-1].log_softmax(-1)
        want = sum(float(step[token]) for step, token in zip(steps, ids[sample], strict=True))
        assert got == pytest.approx(want, abs=1e-4)


# the parts of the pruning, by hand


def test_windows_stop_at_text():
    mask = [bool(int(digit)) for digit in "01111011010"]
    assert naive.cut_windows(mask, 3) == [[1, 2, 3], [4], [6, 7], [9]]
    assert naive.cut_windows(mask, 1) == [[1], [2], [3], [4], [6], [7], [9]]
    assert naive.cut_windows([False, False], 3) == []


@pytest.mark.parametrize(
    ("n_vis", "windows", "keep", "merge", "window", "want"),
    [
        (32, 12, 0.7, 0.2, 3, (22, 4)),
        (16, 6, 0.7, 0.2, 3, (11, 2)),
        (10, 4, 0.5, 0.5, 3, (5, 2)),
        (10, 4, 0.9, 1.0, 3, (9, 0)),  # merging even one window of three would leave eight
        (3, 1, 0.1, 1.0, 3, (1, 0)),  # at least one token stays, at least one window is not merged
        (9, 9, 0.5, 1.0, 1, (4, 4)),  # windows of one token
        (9, 3, 1.0, 1.0, 3, (9, 0)),
        (1, 1, 0.1, 1.0, 3, (1, 0)),
        (0, 0, 0.5, 0.5, 3, (0, 0)),
    ],
)
def test_counts(n_vis, windows, keep, merge, window, want):
    assert naive.count_survivors(n_vis, windows, keep, merge, window) == want


def test_redundancy_by_hand():
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    windows = [[0, 1], [3, 4], [5]]
    probs = [east, east, north, east, north, east]  # token 2 is text
    importance = [0.1, 0.3, 9.0, 0.4, 0.4, 0.1]
    similarity = [1.0, 0.5**0.5, 0.0]  # twice the same; at right angles; a window of one token
    attention = [0.5, 1.0, 0.25]  # means .2, .4, .1
    for strategy, want in {
        "routing_similarity": similarity,
        "dynamic_attention": [-a for a in attention],
        "hybrid": [0.3 * s - 0.7 * a for s, a in zip(similarity, attention, strict=True)],
    }.items():
        assert naive.redundancy(probs, importance, windows, strategy, 0.3) == pytest.approx(want, abs=1e-6)


def test_merge_by_hand():
    vectors = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    torch.testing.assert_close(naive.merge(vectors, "mean"), torch.tensor([1.5, 2.0]))
    torch.testing.assert_close(naive.merge(vectors, "mlerp"), torch.tensor([2.4, 3.2]))  # direction (.6, .8), norm 4
    opposite = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])]
    torch.testing.assert_close(naive.merge(opposite, "mlerp"), torch.zeros(2))


def test_ties_go_to_the_earlier():
    assert naive.best([1.0, 2.0, 2.0, 0.0, 2.0], 2) == ([1, 2], 0.0)


# pruning in the model: what must hold whatever the weights are


def test_counts_of_each_stage():
    one, two = pruned()
    # one run of 16; two runs of 16: see test_counts. Second stage: int(11 * .7), int(22 * .7)
    assert [len(stage.entering) for stage in one.stages] == [16, 11]
    assert [len(stage.entering) for stage in two.stages] == [32, 22]
    assert [len(stage.merged) + len(stage.kept) for stage in one.stages] == [11, 7]
    assert [len(stage.merged) + len(stage.kept) for stage in two.stages] == [22, 15]
    assert [len(stage.merged) for stage in one.stages] == [2, 1]
    assert [len(stage.merged) for stage in two.stages] == [4, 3]
    assert one.tokens_per_layer == (24, 19, 19, 15, 15, 15)  # 8 words; 3 before the first image, 5 at the end
    assert two.tokens_per_layer == (45, 35, 35, 28, 28, 28)  # 13 words; 4 before, 4 between, 5 at the end
    # attention of a prune layer still runs on the full sequence
    assert one.cache_lengths == (24, 24, 19, 19, 15, 15)
    assert two.cache_lengths == (45, 45, 35, 35, 28, 28)


def test_text_is_never_touched_and_order_is_kept():
    _, batch = model_and_batch()
    for sample, prefill in enumerate(pruned()):
        is_image = (words_of(batch, sample) == IMAGE_TOKEN).tolist()
        assert list(prefill.positions) == sorted(set(prefill.positions))
        assert prefill.vision == tuple(is_image[position] for position in prefill.positions)
        text = [position for position, image in enumerate(is_image) if not image]
        assert [position for position in prefill.positions if not is_image[position]] == text


def test_every_token_has_one_fate():
    for prefill in pruned():
        for stage in prefill.stages:
            members = [position for window in stage.merged for position in window]
            assert sorted([*members, *stage.kept, *stage.dropped]) == list(stage.entering)
            assert sorted(position for window in stage.windows for position in window) == list(stage.entering)
            first = {window[0] for window in stage.merged}
            flagged = {p for p, flag in zip(stage.survivors, stage.merged_flags, strict=True) if flag}
            assert flagged == first
            assert first | set(stage.kept) == set(stage.survivors) & set(stage.entering)
        assert prefill.stages[1].entering == tuple(
            position for position in prefill.stages[0].survivors if position in prefill.stages[0].entering
        )
        assert prefill.stages[1].survivors == prefill.positions


def test_no_window_reaches_over_text():
    two = pruned()[1]  # images at 4..19 and 24..39, words between them
    for stage in two.stages:
        for window in stage.windows:
            assert all(position < 20 for position in window) or all(position >= 24 for position in window)
            assert 1 <= len(window) <= 3


@pytest.mark.parametrize("strategy", ["hybrid", "routing_similarity", "dynamic_attention"])
@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_dropping_equals_masking(strategy, keep):
    """Without merging, a pruned token is one that the later layers' attention cannot see: ask transformers for that."""
    model, batch = model_and_batch()
    config = replace(PRUNE, merge_ratio=0.0, strategy=strategy, stage_keep_ratios=(keep, keep))
    for sample, generation in enumerate(naive.greedy(model, batch, config, 5)):
        prefill, row = generation.prefill, alone(batch, sample)
        row["input_ids"] = torch.cat([row["input_ids"], torch.tensor([generation.ids[:-1]])], dim=1)
        length = row["input_ids"].shape[1]
        row["attention_mask"] = torch.ones(1, length, dtype=torch.long)
        hooks, gone = [], []
        for index, layer in enumerate(model.model.language_model.layers):
            mask = torch.ones(length, length).tril().bool()
            mask[:, gone] = False
            mask |= torch.eye(length, dtype=torch.bool)  # a dropped token sees itself, and nobody looks at it
            mask = mask[None, None]
            hooks.append(
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
                )
            )
            gone = gone + [p for stage in prefill.stages if stage.layer == index for p in stage.dropped]
        with torch.no_grad():
            logits = model(**row).logits[0].double()
        for hook in hooks:
            hook.remove()
        n_prompt = length - 4
        torch.testing.assert_close(logits[:n_prompt][list(prefill.positions)], prefill.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[n_prompt - 1 :], generation.logits, atol=1e-4, rtol=1e-4)


def test_importance_is_the_last_rows_attention():
    model, batch = tiny_internvl(attn_implementation="eager"), model_and_batch()[1]
    config = Settings(prune_layers=(2,), stage_keep_ratios=(0.5,), merge_ratio=0.0)
    with torch.no_grad():
        attention = model(**batch, output_attentions=True).attentions[2].mean(dim=1)[:, -1]  # [B, n]
    for sample, prefill in enumerate(naive.prefill(model, batch, config)):
        stage = prefill.stages[0]
        start = int((batch["attention_mask"][sample] == 0).sum())
        importance = {position: float(attention[sample, start + position]) for position in stage.entering}
        assert min(importance[position] for position in stage.kept) > max(importance[p] for p in stage.dropped)


# fewer experts


def test_fewer_experts_in_the_last_layer():
    """There only the vision tokens' own logits can change, and to those of a model with a smaller top-k there."""
    model, batch = tiny_internvl(), model_and_batch()[1]
    with torch.no_grad():
        dense = model(**batch).logits.double()
        model.model.language_model.layers[5].mlp.gate.top_k = 2
        fewer = model(**batch).logits.double()
    for sample, prefill in enumerate(naive.prefill(model, batch, Settings(vision_top_k=2, reduction_layer=5))):
        valid = batch["attention_mask"][sample].bool()
        vision = words_of(batch, sample) == IMAGE_TOKEN
        want = torch.where(vision[:, None], fewer[sample][valid], dense[sample][valid])
        torch.testing.assert_close(prefill.logits, want, atol=1e-4, rtol=1e-4)
        assert (fewer - dense)[sample][valid][vision].abs().max() > 0.1


def test_without_normalisation_the_weights_keep_their_sum():
    """Top-1 of two: the chosen expert gets the weight of both."""
    model, batch = tiny_internvl(norm_topk_prob=False, num_experts=2, num_experts_per_tok=2), model_and_batch()[1]
    got = naive.prefill(model, batch, Settings(vision_top_k=1, reduction_layer=5))
    last = model.model.language_model.layers[5].mlp.gate
    last.top_k, last.norm_topk_prob = 1, True  # weight 1 = the sum over both experts
    with torch.no_grad():
        logits = model(**batch).logits.double()
    for sample, prefill in enumerate(got):
        vision = words_of(batch, sample) == IMAGE_TOKEN
        want = logits[sample][batch["attention_mask"][sample].bool()]
        torch.testing.assert_close(prefill.logits[vision], want[vision], atol=1e-4, rtol=1e-4)


def test_reduction_starts_at_its_layer():
    model, batch = model_and_batch()
    first, second = (
        naive.prefill(model, batch, Settings(vision_top_k=1, reduction_layer=layer))[0] for layer in (4, 5)
    )
    text = ~torch.tensor(first.vision)
    # layer 4 feeds the attention of layer 5, so the words notice; layer 5 feeds nothing
    assert (first.logits - second.logits)[text].abs().max() > 1e-2
    none = naive.prefill(model, batch, Settings(vision_top_k=1, reduction_layer=6))[0]
    torch.testing.assert_close(second.logits[text], none.logits[text], atol=1e-12, rtol=0)
