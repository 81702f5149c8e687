"""The host's plan of a step against lists of tokens: no vLLM needed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmoe import FastMMoEConfig
from fastmmoe.engines.vllm.plan import Prompt, Row, Rules, Step

RATIOS = (0.7, 1.0, 0.5)
CONFIG = FastMMoEConfig(prune_layers=(1, 2, 4), keep_ratios=RATIOS, vision_top_k=1)
RULES = Rules(CONFIG, longest=200)


@st.composite
def prompts(draw, rules=RULES):
    """Text and images in turns, text at the end."""
    length, vision = 0, []
    for text, image in draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 12)), max_size=3)):
        vision.append((length + text, length + text + image))
        length += text + image
    return Prompt.of(rules, length + draw(st.integers(1, 5)), vision, wants_logprobs=False)


@st.composite
def rows(draw):
    prompt = draw(prompts())
    kind = draw(st.sampled_from(("prefill", "again", "chunk", "decode")))
    if kind == "prefill":
        return Row(prompt, 0, prompt.length, prompt.prunes)
    if kind == "again":  # behind the prompt, what was generated before a preemption
        return Row(prompt, 0, prompt.length + draw(st.integers(1, 3)), prompt.prunes)
    if kind == "decode":
        return Row(prompt, prompt.length + draw(st.integers(0, 3)), 1, prompt.prunes)
    start = draw(st.integers(0, prompt.length - 1))
    return Row(prompt, start, draw(st.integers(1, prompt.length - start)), False)


def is_vision(row, position):
    return any(start <= position < end for start, end in row.prompt.vision)


@settings(max_examples=300, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_step_against_lists(batch, random):
    step = Step(len(RATIOS), batch)
    # tokens by row: positions of the request
    tokens = [list(range(row.computed, row.computed + row.new)) for row in batch]
    cached = [list(range(row.computed)) for row in batch]
    for number, row in enumerate(batch):
        if row.is_short and row.computed:
            gone = set(random.sample([p for p in cached[number] if is_vision(row, p)], row.prompt.removed(3)))
            cached[number] = [p for p in cached[number] if p not in gone]
    assert step.prunes == any(row.is_short and not row.computed for row in batch)
    expected = [is_vision(row, p) for row, at in zip(batch, tokens, strict=True) for p in at]
    assert step.vision_rows().tolist() == expected
    assert step.removed(3).tolist() == [
        row.prompt.removed(3) if row.is_short else 0 for row in batch
    ]
    pruned = [number for number, row in enumerate(batch) if row.is_short and not row.computed]
    has_shortened = False
    for stage in range(len(RATIOS)):
        flat = [(number, p) for number, at in enumerate(tokens) for p in at]
        assert step.bounds(stage).tolist() == np.cumsum([0, *map(len, tokens)]).tolist()
        assert step.n_vision[stage] == sum(is_vision(batch[number], p) for number, p in flat)
        if not pruned:
            assert not step.prunes
            continue
        cut = step.cut(stage)
        width = max(len(tokens[number]) for number in pruned)
        padded = cut.padded.reshape(len(pruned), width)
        for place, number in enumerate(pruned):
            own = tokens[number]
            assert [flat[i] for i in padded[place, : len(own)]] == [(number, p) for p in own]
            assert all(flat[i][0] == number for i in padded[place])
            asking = batch[number].prompt.length - 1
            assert flat[cut.asking[place]] == (number, asking)
            assert cut.prompts[place] == own.index(asking) + 1
        if has_shortened:
            assert cut.layout is None
        else:
            layout = cut.layout
            assert layout.padding_side == "right" and layout.lengths == tuple(len(tokens[number]) for number in pruned)
            ranks = layout.run_rank.tolist()
            for place, number in enumerate(pruned):
                expected = [is_vision(batch[number], p) for p in tokens[number]]
                assert [rank >= 0 for rank in ranks[place][: len(expected)]] == expected
        # any survivors: how many is known
        left = list(tokens)
        for number in pruned:
            seen = [p for p in tokens[number] if is_vision(batch[number], p)]
            target = CONFIG.vision_left(stage, len(seen))
            kept = set(random.sample(seen, target))
            left[number] = [p for p in tokens[number] if p in kept or p not in seen]
            has_shortened |= target < len(seen)
        short = max(len(left[number]) for number in pruned)
        rows_left = [left[number] + [None] * (short - len(left[number])) for number in pruned]
        source = flat + [(number, p) for number, at in zip(pruned, rows_left, strict=True) for p in at]
        assert [source[i] for i in cut.packed] == [(number, p) for number, at in enumerate(left) for p in at]
        tokens = left
    lengths = [len(at) + len(before) for at, before in zip(tokens, cached, strict=True)]
    full = [row.computed + row.new for row in batch]
    assert lengths == (np.array(full) - step.removed(3)).tolist()


@given(prompts())
def test_prompt_counts(prompt):
    n = sum(end - start for start, end in prompt.vision)
    assert prompt.n_vision == n and prompt.reduces == (n > 0)
    counts = [n]
    for stage in range(len(RATIOS)):
        counts.append(CONFIG.vision_left(stage, counts[-1]))
    assert prompt.left == (tuple(counts) if counts[-1] < n else ())
    assert [prompt.removed(stage) for stage in range(4)] == [n - left for left in counts]


@pytest.mark.parametrize(
    "changes, dense",
    [
        ({}, ""),
        ({"length": 201}, "long"),
        ({"length": 200}, ""),
        ({"length": 14}, "ends_in_vision"),
        ({"wants_logprobs": True}, "prompt_logprobs"),
    ],
)
def test_what_stays_dense(changes, dense):
    prompt = Prompt.of(RULES, **({"length": 20, "vision": [(4, 14)], "wants_logprobs": False} | changes))
    assert prompt.dense == dense and prompt.prunes == (not dense) and prompt.reduces


def test_few_vision_tokens_take_the_stock_model():
    rules = Rules(FastMMoEConfig(prune_layers=(1,), retention=0.5, vision_top_k=1, min_vision_tokens=11), 200)
    prompt = Prompt.of(rules, 20, [(4, 14)], False)
    assert prompt.dense == "few_vision_tokens" and not prompt.prunes and not prompt.reduces
    assert Step(1, [Row(prompt, 0, 20, False)]).n_vision == (0, 0)


def test_text_is_not_dense():
    assert Prompt.of(RULES, 20, [], True).dense == ""


def test_features_that_adjoin_are_one_run():
    assert Prompt.of(RULES, 20, [(8, 12), (4, 8), (13, 15)], False).vision == ((4, 12), (13, 15))
