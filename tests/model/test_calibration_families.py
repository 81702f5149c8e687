"""Calibration of every family: answers behind a prompt are what the whole model makes of them, thresholds are found."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastmmoe.calibration import calibrate as module
from fastmmoe.calibration.calibrate import calibrate
from fastmmoe.calibration.samples import answer_log_probs, make_samples
from fastmmoe.study import prompts
from fastmmoe.study.questions import Example

from . import tiny_families

ANSWER, END = [7, 9, 3], 1
REFUSED = {
    "gemma4": "MoE is no module of its own",
    "llama4": "every token takes one expert already",
}
EXAMPLE = Example(Image.new("RGB", (2, 2)), "?", "!")
TARGET = 0.3


class Tokenizer:
    all_special_ids = [END]
    eos_token_id = END

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": ANSWER}


PROCESSOR = SimpleNamespace(tokenizer=Tokenizer())


@pytest.fixture
def built(request, monkeypatch):
    model, inputs = tiny_families.FAMILIES[request.param]()
    monkeypatch.setattr(prompts, "build_inputs", lambda *_: inputs)
    # few: the walk along all of them is tested elsewhere
    monkeypatch.setattr(module, "thresholds", lambda modality: tuple(10.0**power for power in range(-6, 0)))
    return model, inputs


@pytest.mark.parametrize("built", [name for name in tiny_families.FAMILIES if name not in REFUSED], indirect=True)
def test_answers_are_the_whole_models_and_thresholds_are_found(built, tmp_path):
    model, inputs = built
    answer = torch.tensor([[*ANSWER, END]])
    (sample,) = make_samples(model, PROCESSOR, [EXAMPLE], (END,))
    shape, whole = inputs["input_ids"].shape, dict(inputs)
    for name, value in inputs.items():
        if value.shape == shape:
            tail = answer if name == "input_ids" else torch.full_like(answer, int(name == "attention_mask"))
            whole[name] = torch.cat((value, tail.to(value.dtype)), 1)
    with torch.inference_mode():
        want = model(**whole).logits[0, -5:-1].double().log_softmax(-1)
    torch.testing.assert_close(answer_log_probs(model, sample), want, rtol=0, atol=1e-5)
    found = calibrate(model, PROCESSOR, [EXAMPLE], TARGET, tmp_path / "modes.json")
    assert found.config.vision_threshold in module.thresholds("vision")
    assert min(row["skipped"] for row in found.evaluated.values()) < TARGET <= found.chosen["skipped"]


@pytest.mark.parametrize("built", REFUSED, indirect=True)
def test_families_whose_experts_cannot_be_left_out_are_refused(built, request, tmp_path):
    words = REFUSED[request.node.callspec.params["built"]]
    with pytest.raises(ValueError, match=words):
        calibrate(built[0], PROCESSOR, [EXAMPLE], TARGET, tmp_path / "modes.json")
    assert not (tmp_path / "modes.json").exists()
