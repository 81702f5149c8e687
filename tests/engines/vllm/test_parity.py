"""Greedy tokens through vLLM's engine equal those of transformers with FastMMoE, whatever else the engine runs."""

import random

import pytest

from .engine import geometry
from .prompts import ALL, CASES, CLIPS, WAITING
from .reference import answer, prompt_of

ALONE = {"names": list(CASES), "every": None}
TOGETHER = [{"names": random.Random(seed).sample(list(CASES), len(CASES)), "every": 0} for seed in range(3)]
STAGGERED = {"names": [*CASES, *reversed(CASES)], "every": 3}

# prompts longer than what is sure to be run in one step come in chunks
CHUNKS = dict(max_num_batched_tokens=270, max_num_seqs=8, block_size=32)
LONGEST = 263
# few blocks: requests are preempted, and their prompts run again with what was generated behind them
PREEMPTION = dict(block_size=32, num_gpu_blocks_override=23, max_model_len=700, enable_prefix_caching=False)

# three of the first nearly fill the cache, and grow
CROWD = {"names": ["one image"] * 7 + ["until the end", "adjoining images"] * 2, "every": 0}

SETTINGS = {
    "experts": {"vision_top_k": 1, "reduction_layer": 1},
    "prune": {"vision_top_k": None, "retention": 0.4, "prune_layers": [2, 4, 6]},
    "both": {"vision_top_k": 2, "retention": 0.4, "prune_layers": [2, 4, 6], "merge_ratio": 0.2},
    "redundancy": {
        "vision_top_k": 1, "retention": 0.3, "prune_layers": [0, 1, 5], "keep_by": "redundancy", "steepness": 0.8
    },
}  # fmt: skip

# where others cannot prune
PLACED = {"glm4v_moe": {"redundancy": {"prune_layers": [1, 2, 5]}}}


def check(result, directory, reduction, schedules, dense=(), cases=CASES, ranks=1):
    """All answers equal, of cases in `dense` those without pruning; how many differ from the stock model's.

    Of several ranks, which are processes of their own, survivors are not known.
    """
    unpruned = {name: value for name, value in reduction.items() if name in ("vision_top_k", "reduction_layer")}
    expected = {name: answer(directory, name, unpruned if name in dense else reduction)[0] for name in cases}
    wrong = [
        (name, tokens, expected[name])
        for schedule in result["answers"]
        for name, tokens in schedule
        if tokens != expected[name]
    ]
    for name in cases if ranks == 1 else ():
        left = answer(directory, name, reduction)[1]
        found = result["survivors"].get(geometry(*prompt_of(directory, name)), [])
        # once, alone, in a batch or run again after a preemption: always the same
        assert found == ([] if name in dense or not left else [left]), f"wrong survivors: {name}"
    assert sum(map(len, result["answers"])) == sum(len(schedule["names"]) for schedule in schedules)
    assert not wrong, f"{len(wrong)} wrong, the first: {wrong[0]}"
    return sum(expected[name] != answer(directory, name, None)[0] for name in cases)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "internvl_qwen3_moe"])
def test_continuous_batching(checkpoint, engine, name, setting):
    directory, reduction = checkpoint(name), SETTINGS[setting]
    schedules = [ALONE, *TOGETHER, STAGGERED]
    result = engine(directory, schedules, reduction)
    assert check(result, directory, reduction, schedules) >= 3  # else nothing was reduced
    assert result["tracked"] <= 1 and not any(result["compiled"])
    # text in front of an image, and whole texts, are taken from the prefix cache
    assert result["prefix_hits"] > 0


@pytest.mark.parametrize("setting", ["both", "redundancy"])
@pytest.mark.parametrize("name", ["glm4v_moe", "qwen3_omni_moe_thinker", "aria"])
def test_further_families(checkpoint, engine, name, setting):
    directory, reduction = checkpoint(name), SETTINGS[setting] | PLACED.get(name, {}).get(setting, {})
    schedules = [ALONE, TOGETHER[0], STAGGERED]
    result = engine(directory, schedules, reduction)
    assert check(result, directory, reduction, schedules) >= 3


@pytest.mark.parametrize("setting", ["both", "redundancy"])
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "internvl_qwen3_moe"])
def test_v2_runner(checkpoint, engine, name, setting):
    directory, reduction = checkpoint(name), SETTINGS[setting]
    schedules = [ALONE, TOGETHER[0], STAGGERED]
    result = engine(directory, schedules, reduction, runner="V2")
    assert check(result, directory, reduction, schedules) >= 3


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_preemption(checkpoint, engine, runner):
    directory, reduction = checkpoint("qwen3_vl_moe"), SETTINGS["both"]
    schedules = [CROWD, CROWD, ALONE]
    result = engine(directory, schedules, reduction, runner, **PREEMPTION)
    check(result, directory, reduction, schedules)
    assert result["preempted"] >= 3


@pytest.mark.parametrize("caching", [True, False])
def test_chunked_prefill(checkpoint, engine, caching):
    """What comes in chunks is not pruned; all else is."""
    directory, reduction = checkpoint("qwen3_vl_moe"), SETTINGS["both"]
    schedules = [ALONE, *TOGETHER, STAGGERED]
    result = engine(directory, schedules, reduction, **CHUNKS, enable_prefix_caching=caching)
    dense = {case for case in CASES if prompt_of(directory, case)[0] > LONGEST}
    pruned = {case for case in CASES if CASES[case].has_vision} - dense
    assert {"long text", "two images"} <= dense and {"one image", "adjoining images"} <= pruned
    check(result, directory, reduction, schedules, dense)
    runs = len(schedules) + 1  # the last one has every case twice
    too_long = sum(bool(CASES[case].has_vision) for case in dense)
    assert result["counts"]["fastmmoe:prompts_dense_total/long"] == runs * too_long
    assert result["counts"]["fastmmoe:prompts_pruned_total"] == runs * len(pruned)


@pytest.mark.parametrize("setting", ["both", "redundancy"])
def test_videos(checkpoint, engine, setting):
    directory, reduction = checkpoint("qwen3_vl_moe"), SETTINGS[setting]
    names = [*CLIPS, "one image", "text"]
    schedules = [{"names": names, "every": None}, {"names": names * 2, "every": 2}]
    result = engine(directory, schedules, reduction, limit_mm_per_prompt={"image": 2, "video": 1})
    check(result, directory, reduction, schedules, cases=CLIPS | {name: CASES[name] for name in names[2:]})


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe"])
def test_compiled(checkpoint, engine, tmp_path, name):
    """The stretches are compiled when the engine starts; the second time, they come from vLLM's cache."""
    directory, reduction = checkpoint(name), SETTINGS["both"]
    schedules = [ALONE, STAGGERED]
    for _ in range(2):
        result = engine(
            directory, schedules, reduction, environment={"VLLM_CACHE_ROOT": str(tmp_path)}, enforce_eager=False
        )
        check(result, directory, reduction, schedules)
        assert result["compiled"] == [True] * 4


def test_compiled_in_chunks(checkpoint, engine):
    """Steps whose vision tokens take fewer experts, and of which none goes."""
    directory, reduction = checkpoint("qwen3_vl_moe"), SETTINGS["both"]
    schedules = [ALONE, TOGETHER[0]]
    result = engine(directory, schedules, reduction, enforce_eager=False, **CHUNKS)
    check(result, directory, reduction, schedules, {case for case in CASES if prompt_of(directory, case)[0] > LONGEST})


@pytest.mark.parametrize("setting", ["experts", "both"])
def test_prompts_with_few_vision_tokens(checkpoint, engine, setting):
    """They take all experts, and share no blocks of an image with prompts that do not."""
    directory, reduction = checkpoint("qwen3_vl_moe"), SETTINGS[setting] | {"min_vision_tokens": 150}
    schedules = [ALONE, {"names": [*reversed(CASES)], "every": None}, TOGETHER[0]]
    result = engine(directory, schedules, reduction, block_size=32)
    assert check(result, directory, reduction, schedules) >= 3
    assert answer(directory, "until the end", reduction) == (answer(directory, "until the end", None)[0], [])


def test_waiting_prompts_do_not_hold_images(checkpoint, engine):
    """One that waits for a step with room leaves the encoder's cache to one that is more important."""
    directory, reduction = checkpoint("qwen3_vl_moe"), SETTINGS["both"]
    texts = ["long text alone"] * 2
    schedules = [
        {"names": ["one to cache"]},
        {"names": [*texts, "one more", "two others"], "every": [0, 0, 0, 3], "priorities": [0, 0, 5, 1]},
    ]
    result = engine(
        directory, schedules, reduction, max_num_batched_tokens=340, max_num_seqs=4, scheduling_policy="priority",
        enable_prefix_caching=False,
    )  # fmt: skip
    used = {name: ALL[name] for name in (*texts, *WAITING)}
    check(result, directory, reduction, schedules, cases=used)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe"])
def test_two_ranks(checkpoint, engine, name):
    directory, reduction = checkpoint(name), SETTINGS["both"]
    schedules = [*TOGETHER, STAGGERED]
    result = engine(
        directory, schedules, reduction, environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, tensor_parallel_size=2,
        distributed_executor_backend="mp",
    )  # fmt: skip
    check(result, directory, reduction, schedules, ranks=2)


def test_dense_layers_do_not_prune(checkpoint, engine):
    with pytest.raises(AssertionError, match=r"prune_layers=\(0, 2\): layer 0 cannot prune: it has no experts"):
        engine(checkpoint("glm4v_moe"), [ALONE], {"prune_layers": [0, 2], "retention": 0.5})


def test_sliding_windows_are_refused(checkpoint, engine):
    with pytest.raises(AssertionError, match=r"prune_layers=\(1,\): not supported here: layer 0 is a TransformerBlock"):
        engine(checkpoint("internvl_gpt_oss"), [ALONE], {"prune_layers": [1], "retention": 0.5, "vision_top_k": None})
