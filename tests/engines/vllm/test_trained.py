"""A trained model's answers to questions about pictures, through vLLM's engine and through transformers."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import fastmmoe
from fastmmoe.families.chat import build_inputs
from fastmmoe.scenes import CHECKPOINT

from .conftest import ENVIRONMENT, ROOT, RUNNERS
from .trained import asked, pictures, save_padded

NEW_TOKENS = 8
SETTINGS = {
    "stock": None,
    "both": {"vision_top_k": 2, "reduction_layer": 2, "prune_layers": [2, 4], "retention": 0.3},
    "redundancy": {"vision_top_k": 1, "reduction_layer": 1, "prune_layers": [1, 3, 5], "retention": 0.2,
                   "keep_by": "redundancy"},
}  # fmt: skip


@cache
def original():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval(), (
        AutoProcessor.from_pretrained(CHECKPOINT)
    )


@cache
def answers(setting):
    """Ids that the shipped checkpoint generates, by transformers, question by question."""
    model, processor = original()
    images, found = pictures(), []
    if SETTINGS[setting]:
        # by the preset, as the plugin: with `keep_by="redundancy"` it brings its own alpha
        fastmmoe.enable(model, fastmmoe.FastMMoEConfig.preset(model, **SETTINGS[setting]))
    try:
        for number, question in asked():
            inputs = build_inputs(model, processor, [images[number]], question)
            with torch.inference_mode():
                output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            found.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    finally:
        fastmmoe.disable(model)
    return found


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    return save_padded(tmp_path_factory.mktemp("padded"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_answers(padded, tmp_path, setting):
    processor = original()[1]
    content = [[{"type": "image"}, {"type": "text", "text": question}] for _, question in asked()]
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
        for parts in content
    ]
    reduction = {"additional_config": {"fastmmoe": SETTINGS[setting]}} if SETTINGS[setting] else {}
    spec, result = tmp_path / "spec.json", tmp_path / "result.json"
    spec.write_text(
        json.dumps(
            {"directory": str(padded), "prompts": prompts, "new_tokens": NEW_TOKENS, "max_model_len": 512,
             "max_num_seqs": 16, "max_num_batched_tokens": 2048, "limit_mm_per_prompt": {"video": 0}} | reduction
        )
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.engines.vllm.trained", spec, result],
        env=os.environ | ENVIRONMENT | RUNNERS["V1"] | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    got, want = json.loads(result.read_text()), answers(setting)
    wrong = [(asked()[i], a, b) for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    assert len(want) >= 40 and not wrong, f"{len(wrong)} of {len(want)} wrong: {wrong[:3]}"
    if SETTINGS[setting]:
        changed = sum(a != b for a, b in zip(want, answers("stock"), strict=True))
        assert changed >= 3  # else nothing was reduced
