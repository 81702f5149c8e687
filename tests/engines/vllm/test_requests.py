"""Which prompts a runner's rows have: requests come, go, and come again under the same name."""

from types import SimpleNamespace

import numpy as np

from fastmmoe import FastMMoEConfig
from fastmmoe.engines.vllm.plan import Rules
from fastmmoe.engines.vllm.requests import Requests
from fastmmoe.engines.vllm.runners import _step_of

RULES = Rules(FastMMoEConfig(prune_layers=(1,), retention=0.5), 100)


def feature(start, length):
    position = SimpleNamespace(extract_embeds_range=lambda: [(start, start + length - 1)])
    return SimpleNamespace(modality="image", mm_position=position)


def state(length, *features):
    return SimpleNamespace(num_prompt_tokens=length, mm_features=list(features), sampling_params=None)


def step(reduction, requests, computed, new):
    names = list(requests)
    batch = SimpleNamespace(req_ids=names, num_computed_tokens_cpu=np.array(computed + [0] * 3))
    runner = SimpleNamespace(input_batch=batch, requests=requests)
    return _step_of(runner, reduction, None if new is None else dict(zip(names, new, strict=True)))


def test_a_name_that_is_used_again():
    reduction = SimpleNamespace(requests=Requests(RULES))
    first = step(reduction, {"a": state(20, feature(2, 10))}, [0], [20])
    assert first.prunes and first.removed(1).tolist() == [5]
    again = step(reduction, {"a": state(30, feature(2, 20))}, [0], [30])
    assert again.rows[0].prompt.length == 30 and again.removed(1).tolist() == [10]


def test_a_request_through_its_life():
    reduction, requests = SimpleNamespace(requests=Requests(RULES)), {"a": state(20, feature(2, 10)), "b": state(5)}
    assert step(reduction, requests, [0, 0], [20, 5]).removed(1).tolist() == [5, 0]
    decoding = step(reduction, requests, [20, 5], [1, 1])
    assert not decoding.prunes and decoding.removed(1).tolist() == [5, 0]
    # preempted, and run again with what was generated
    assert step(reduction, requests, [0, 6], [22, 1]).prunes
    assert step(reduction, requests, [22, 7], [1, 1]).removed(1).tolist() == [5, 0]
    # run again in chunks, which a scheduler of ours does not do: then it is not pruned
    assert step(reduction, requests, [0, 8], [10, 1]).removed(1).tolist() == [0, 0]
    assert step(reduction, requests, [10, 9], [12, 1]).removed(1).tolist() == [0, 0]
    step(reduction, {"b": requests["b"]}, [10], [1])
    assert "a" not in reduction.requests._prompts and not reduction.requests._short


def test_profiling_has_no_plan():
    reduction = SimpleNamespace(requests=Requests(RULES))
    assert step(reduction, {"a": state(20)}, [0], None) is None
    assert reduction.requests.step(["unknown"], [0], [4]) is None
