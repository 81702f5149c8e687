"""Models that two processes hold together, by gloo on CPUs, against one process: logits, answers, survivors."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

import fastmmoe

from .. import tiny_families
from ..tiny_families import IS_5_17
from .launch import launch
from .samples import batch_of_rank
from .worker import CASES, PROCESSES, SPLITS, is_held, load, results, save_tiny

# 5.17's tensor parallelism names no mesh dimension, and is refused; it has no expert parallelism
pytestmark = pytest.mark.skipif(IS_5_17, reason="transformers of that age splits models in another way")

FAMILIES = ("internvl_qwen3_moe", "qwen3_vl_moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The models, and what two processes made of them."""
    folder = tmp_path_factory.mktemp("distributed")
    for family in FAMILIES:
        save_tiny(family, folder / family)
    launch("model.distributed.worker", folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """family, process -> what one process makes of that process's prompts."""

    @cache
    def of(family: str, rank: int) -> dict[str, dict[str, Any]]:
        return results(load(folder / family), batch_of_rank(family, rank), tuple(CASES))

    return of


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_processes_equal_one(family, split, folder, alone):
    if not is_held(family, split):
        pytest.skip("transformers cannot load it so")
    for rank in range(PROCESSES):
        found = torch.load(folder / f"{family}-{split}-{rank}.pt")
        assert isinstance(found, dict), found
        assert tuple(found) == SPLITS[split].cases
        want = alone(family, 0 if SPLITS[split].shares_batch else rank)
        for case, got in found.items():
            torch.testing.assert_close(got["logits"], want[case]["logits"], rtol=1e-4, atol=1e-4, msg=case)
            for name in ("answers", "tokens", "fates", "pairs"):
                assert str(got.get(name)) == str(want[case].get(name)), (case, name, rank)


@pytest.mark.parametrize("part", ["experts", "attention"])
def test_what_else_was_split_is_refused(part, folder):
    for rank in range(PROCESSES):
        said = torch.load(folder / f"refusals-{rank}.pt")
        for dimension in ("rows", None):
            expected = f"of layer 3's {part} are split along a dimension of their device mesh named {dimension!r}"
            assert expected in said[f"{part}, {dimension}"]
        expected = "by something else than transformers' DistributedConfig" if part == "experts" else "nothing"
        assert expected in said[f"{part}, tp"]


def test_a_gate_that_is_gathered_alone_cannot_be_asked(folder):
    for rank in range(PROCESSES):
        said = torch.load(folder / f"refusals-{rank}.pt")["gate"]
        assert "layer 1's gate cannot be asked: FSDP gathers its weights for it alone" in said


def test_another_experts_implementation_while_enabled(folder, alone):
    want = alone("internvl_qwen3_moe", 0)["both"]["logits"]
    for rank in range(PROCESSES):
        for name, got in torch.load(folder / f"switched-{rank}.pt").items():
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=name)


def test_a_pipeline_is_refused():
    model = tiny_families.internvl_qwen3_moe()[0]
    model.model.language_model.layers[4] = PipelineIdentityLayer()
    with pytest.raises(ValueError, match="model: layer 4 is another process's"):
        fastmmoe.enable(model, CASES["stages"])


def test_experts_that_route_themselves_are_refused():
    model = tiny_families.internvl_qwen3_moe()[0]
    model.model.language_model.layers[0].mlp.experts.config._experts_implementation = "deepgemm_megamoe"
    with pytest.raises(ValueError, match="'deepgemm_megamoe' is not supported together with fewer experts"):
        fastmmoe.enable(model, CASES["both"])
    fastmmoe.enable(model, CASES["stages"])
