"""Every family in the study: batches answer as the whole model does, one prompt at a time."""

import pytest
import torch

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.families import find_text_model
from fastmmoe.study import prompts
from fastmmoe.study.answers import answer, prefill
from fastmmoe.study.questions import Example

from . import tiny_families

MORE = (7, 3, 9)  # ids of a longer question
# the mask of these is the model's own making, or they need features of every token: the whole model runs each time
WHOLE = {"gemma4"}
# blocks of its sparse attention begin with padding, whoever runs it: behind padding the stock model says other things
NO_PADDING = {"minimax_m3_vl"}


def longer(inputs: dict) -> dict:
    """The same picture with a longer question behind it."""
    shape, more = inputs["input_ids"].shape, torch.tensor([MORE])
    fill = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    return {
        name: torch.cat((value, fill.get(name, torch.zeros_like(more)).to(value.dtype)), 1)
        if value.shape == shape
        else value
        for name, value in inputs.items()
    }


def reduction(model) -> FastMMoEConfig:
    """Pruning at two layers; fewer experts where no layer may prune."""
    family, text, _ = find_text_model(model)
    moe = [number for number, layer in enumerate(text.layers) if family.is_moe(layer)]
    sound = [number for number in moe if not family.why_not_prune(text.config, number)]
    if sound:
        return FastMMoEConfig(prune_layers=tuple(sound[:2]), retention=0.5)
    return FastMMoEConfig(vision_top_k=1, reduction_layer=1)


@pytest.mark.parametrize("reduced", [False, True], ids=["dense", "reduced"])
@pytest.mark.parametrize("name", tiny_families.FAMILIES)
@torch.inference_mode()
def test_batches_answer_as_the_whole_model_does(name, reduced, monkeypatch):
    model, inputs = tiny_families.FAMILIES[name]()
    config = reduction(model) if reduced else None
    both = [inputs if name in NO_PADDING else longer(inputs), inputs]
    waiting = iter(both)
    monkeypatch.setattr(prompts, "build_inputs", lambda *_: next(waiting))
    examples = [Example(torch.zeros(1), "?", "!") for _ in both]
    monkeypatch.setattr(Example, "open_image", lambda self: None)
    (batch,) = prompts.make_batches(prompts.encode(model, None, examples), 2)
    assert (batch.attention_mask is None) == (name in NO_PADDING)
    assert (batch.embeddings is None) == (name in WHOLE)
    said = answer(model, batch, config, max_new_tokens=3, end=())
    with fastmmoe.enabled(model, config or FastMMoEConfig()):
        logits = [prefill(model, one).logits[:, -1:] for one in (batch, *batch.alone())]
        for row, number in enumerate(batch.numbers):
            want = model(**both[number]).logits[:, -1:]
            torch.testing.assert_close(logits[0][row : row + 1], want, rtol=0, atol=1e-4)
            torch.testing.assert_close(logits[1 + row], want, rtol=0, atol=1e-4)
            tokens = model.generate(**both[number], max_new_tokens=3, do_sample=False, eos_token_id=None)
            assert said[row] == tokens[0, both[number]["input_ids"].shape[1] :].tolist()
