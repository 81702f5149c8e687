"""vLLM's own server with a reduced prefill: answers, metrics, and what many clients do to it, rude ones among them."""

import json
import os
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache

import pytest
import torch
from transformers import AutoModelForImageTextToText

import fastmmoe
from fastmmoe.families.chat import build_inputs
from fastmmoe.families.processors import load_processor
from fastmmoe_cli.compare import compare

from .conftest import ROOT
from .prompts import BIG, MIDDLE, SMALL, TINY, picture
from .server import SERVER_ENVIRONMENT, Server, complete, png

REDUCTION = {"retention": 0.4, "prune_layers": [2, 4, 6]}
FLAGS = ["--retention", "0.4", "--prune-layers", "2,4,6"]
# whatever else runs on this machine: by default most of its memory has to be free
OPTIONS = ["--max-model-len", "700", "--max-num-seqs", "16", "--enforce-eager", "--dtype", "float32",
           "--gpu-memory-utilization", "0.2"]  # fmt: skip
# few, so that the cache has been touched all over before its memory is measured
BLOCKS = ["--num-gpu-blocks-override", "100"]
NEW_TOKENS = 12

WHAT, WHERE = "What is in this picture?", "Describe the photograph in one sentence."
# (sizes of pictures, question)
ASKED = [
    ((MIDDLE,), WHAT),
    ((MIDDLE,), WHERE),
    ((BIG,), WHAT),
    ((SMALL,), WHERE),
    ((TINY,), WHAT),
    ((SMALL, MIDDLE), WHERE),
    ((), WHAT),
    ((), WHERE),
]
BY_COMMAND = [ASKED[0], ASKED[1], ASKED[2], ASKED[5]]  # each takes seconds


def pictures(sizes):
    return [picture(*size, seed=number) for number, size in enumerate(sizes)]


def parts(sizes, question):
    return [*map(png, pictures(sizes)), question]


def ask_by_command(directory, folder, sizes, question):
    """What `fastmmoe run --json` says."""
    options = []
    for number, image in enumerate(pictures(sizes)):
        file = folder / f"{number}.png"
        file.write_bytes(png(image))
        options += ["--image", file]
    done = subprocess.run(
        [
            sys.executable, "-m", "fastmmoe_cli", "run", "--json", "--model", directory, "--prompt", question,
            "--device", "cpu", "--dtype", "float32", "--max-new-tokens", str(NEW_TOKENS), *options, *FLAGS,
        ],
        env=os.environ | SERVER_ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    """(a server by `fastmmoe serve`, what `fastmmoe run` says by case)."""
    directory, folder = checkpoint("internvl_qwen3_moe"), tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "fastmmoe_cli", "serve", str(directory), *FLAGS, "--",
               "--max-num-batched-tokens", "2048", *BLOCKS, *OPTIONS]  # fmt: skip
    with Server(command, str(directory), folder / "server.log") as server:
        # while it starts
        said = {case: ask_by_command(directory, folder, *case) for case in BY_COMMAND}
        server.wait()
        yield server, said


@pytest.fixture(scope="module")
def server(served):
    return served[0]


@pytest.fixture(scope="module")
def reference(checkpoint):
    """(family, sizes, question, settings) -> by transformers: the answer, and the report of its prefill."""

    @cache
    def load(family):
        directory = checkpoint(family)
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
        return model, load_processor(str(directory))

    @cache
    def answer(family, sizes, question, **settings):
        model, processor = load(family)
        inputs = build_inputs(model, processor, pictures(sizes), question)
        if not sizes:  # nothing to reduce
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            return complete(text), None
        config = fastmmoe.FastMMoEConfig.preset(model, **settings)
        result = compare(model, processor, inputs, config, max_new_tokens=NEW_TOKENS, runs=0)
        return complete(result.fast_answer), result.report

    return answer


@pytest.fixture(scope="module")
def expected(reference):
    """Case -> its answer, as the first server has to give it."""
    settings = {"retention": 0.4, "prune_layers": (2, 4, 6)}
    return lambda case: reference("internvl_qwen3_moe", *case, **settings)


def counted(reports):
    """What the metrics say of prompts with these reports, all of them pruned."""
    return Counter(
        {
            "vision_tokens_kept": sum(r.n_vision[0] - lost(r) for r in reports),
            "vision_tokens_dropped": sum(map(lost, reports)),
            "vision_tokens_merged": sum(stage.merged[0] for r in reports for stage in r.stages),
            "prompts_pruned": len(reports),
        }
    )


def lost(report):
    return sum(stage.dropped[0] for stage in report.stages)


def added(server, before):
    """What the metrics have more than before; those that have not changed are left out."""
    server.wait_until_idle()
    return {name: value - before[name] for name, value in server.metrics().items() if value != before[name]}


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_as_the_command(served):
    server, answers = served
    differ = 0
    for case in BY_COMMAND:
        asked = answers[case]["answers"]
        assert server.answer(parts(*case), NEW_TOKENS) == complete(asked["fastmmoe"]), case
        differ += asked["fastmmoe"] != asked["dense"]
    assert differ >= 2  # else nothing was reduced
    assert "fastmmoe: FastMMoEConfig(" in server.log()


@pytest.mark.parametrize("case", ASKED, ids=str)
def test_answers_as_transformers(server, expected, case):
    assert server.answer(parts(*case), NEW_TOKENS) == expected(case)[0]


@pytest.mark.parametrize("case", [ASKED[0], ASKED[5], ASKED[6]], ids=str)
def test_streaming(server, expected, case):
    pieces = list(server.stream(parts(*case), NEW_TOKENS))
    assert complete("".join(pieces)) == expected(case)[0]
    assert len([piece for piece in pieces if piece]) > 1


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics(served, expected):
    server, answers = served
    before = server.metrics()
    reports = []
    for case in ASKED:
        server.answer(parts(*case), NEW_TOKENS)
        reports += [expected(case)[1]] if case[0] else []
    got = added(server, before)
    assert got == counted(reports) and all(got.values())
    # the same by what the command says
    for case in BY_COMMAND:
        stages = answers[case]["report"]["stages"]
        assert sum(stage["merged"][0] for stage in stages) == sum(s.merged[0] for s in expected(case)[1].stages)


def test_metrics_of_prompts_that_stay_dense(server, expected):
    before = server.metrics()
    response = server.chat(parts(*ASKED[0]), NEW_TOKENS, prompt_logprobs=1)
    assert response.status_code == 200 and response.json()["prompt_logprobs"][1]
    vision = expected(ASKED[0])[1].n_vision[0]
    assert added(server, before) == {"prompts_dense/prompt_logprobs": 1, "vision_tokens_kept": vision}


def test_metrics_of_merging_and_of_long_prompts(checkpoint, reference, tmp_path):
    """Another family, by vLLM's own command: windows merge; two pictures are more than a step is sure to hold."""
    directory, settings = checkpoint("qwen3_vl_moe"), {"retention": 0.4, "prune_layers": (3, 5), "merge_ratio": 0.3}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory),
               "--additional-config", json.dumps({"fastmmoe": settings}), "--max-num-batched-tokens", "250",
               *OPTIONS]  # fmt: skip
    short, long = ((MIDDLE,), WHAT), ((MIDDLE, SMALL), WHAT)
    with Server(command, str(directory), tmp_path / "server.log") as server:
        server.wait()
        before = server.metrics()
        answer, report = reference("qwen3_vl_moe", *short, **settings)
        assert server.answer(parts(*short), NEW_TOKENS) == answer
        got = added(server, before)
        assert got == counted([report]) and got["vision_tokens_merged"] > 10
        before = server.metrics()
        report = reference("qwen3_vl_moe", *long, **settings)[1]
        server.answer(parts(*long), NEW_TOKENS)
        assert added(server, before) == {"prompts_dense/long": 1, "vision_tokens_kept": report.n_vision[0]}


# --- load -------------------------------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claiming(side):
    """A PNG that says to have so many pixels a side, and has none."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


WHOLE = png(picture(*MIDDLE, seed=0))
MALFORMED = {
    "not an image": b"What is in this picture?",
    "half": WHOLE[: len(WHOLE) // 2],
    "half a header": WHOLE[:20],
    "nothing": b"",
    "huge": claiming(10_000),
}
ONE_PIXEL = ((1, 1),), WHAT


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_image(server, name):
    response = server.chat([MALFORMED[name], WHAT], NEW_TOKENS)
    assert 400 <= response.status_code < 500, response.text[:300]


def test_more_pixels_than_pillow_opens(server):
    """vLLM calls it an error of its own."""
    assert server.chat([claiming(60_000), WHAT], NEW_TOKENS).status_code in (400, 500)
    assert server.is_healthy()


def test_one_pixel(server, expected):
    assert server.answer(parts(*ONE_PIXEL), NEW_TOKENS) == expected(ONE_PIXEL)[0]


REQUESTS, CLIENTS = 200, 8
GROWTH = 16 * 2**20  # bytes, in the second half of the load


def test_load(server, expected):
    rng = random.Random(0)
    kinds = rng.choices(["answer", "stream", "leave", "malformed", "wrong model"], [9, 4, 4, 3, 1], k=REQUESTS)
    load = [(kind, rng.choice(ASKED), rng.choice(list(MALFORMED))) for kind in kinds]
    for case in ASKED:
        # vLLM answers 500 where the second of two clients with a picture that is new overtakes the first
        server.answer(parts(*case), NEW_TOKENS)
    before = server.metrics()

    def send(request):
        kind, case, malformed = request
        if kind == "malformed":
            return server.chat([MALFORMED[malformed], WHAT], NEW_TOKENS).status_code
        if kind == "wrong model":
            return server.chat(parts(*case), NEW_TOKENS, model="another").status_code
        if kind == "answer":
            return server.answer(parts(*case), NEW_TOKENS)
        # with many tokens to come
        pieces = server.stream(parts(*case), NEW_TOKENS if kind == "stream" else 200)
        if kind == "stream":
            return complete("".join(pieces))
        with closing(pieces):
            return next(pieces)

    memory = []
    with ThreadPoolExecutor(CLIENTS) as clients:
        got = []
        for half in (load[: REQUESTS // 2], load[REQUESTS // 2 :]):
            got += clients.map(send, half)
            memory.append(server.memory())
    for (kind, case, _), answer in zip(load, got, strict=True):
        if kind in ("answer", "stream"):
            assert answer == expected(case)[0], case
        elif kind != "leave":
            assert 400 <= answer < 500
    assert not any(server.wait_until_idle()[name] for name in
                   ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))  # fmt: skip
    assert server.is_healthy() and "EngineDeadError" not in server.log()
    well_formed = [case for kind, case, _ in load if kind in ("answer", "stream", "leave") and case[0]]
    assert added(server, before) == counted([expected(case)[1] for case in well_formed])
    assert memory[1] - memory[0] <= GROWTH
