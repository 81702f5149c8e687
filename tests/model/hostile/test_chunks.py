"""Prompts that `generate` feeds in chunks (`prefill_chunk_size`): each is a prefill of its own, on the cache so far."""


import pytest
import torch
from transformers.generation import GenerationMixin

import fastmmoe

from .common import alone, batch_of, config_of, fresh, generate, vision_of

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.skipif(
        not hasattr(GenerationMixin, "_supports_mm_encoder_outputs"), reason="this transformers cannot chunk pictures"
    ),
]


def prompt_of(family):
    """A picture, words, another picture, words; where the first word behind each picture is."""
    prompt = alone(batch_of(family, (2,), text=(3, 24, 9)))[0]
    vision = vision_of(prompt)[0].int()
    return prompt, [int(place) + 1 for place in (vision.diff() == -1).nonzero().flatten()]


@pytest.mark.parametrize("size", [1, 5, 16, 40, 500])
def test_fewer_experts_in_chunks_of_any_size(family, size):
    prompt, _ = prompt_of(family)
    model = fresh(family)
    fastmmoe.enable(model, config_of("experts"))
    assert torch.equal(generate(model, prompt, prefill_chunk_size=size), generate(model, prompt))


def test_pruned_chunk_by_chunk(family):
    """As turns are: the first chunk ends in the words between two pictures, the second is the rest."""
    prompt, behind = prompt_of(family)
    size = behind[0] + 20
    n = prompt["input_ids"].shape[1]
    assert not vision_of(prompt)[0, size - 1] and size < behind[1] < n <= 2 * size
    model = fresh(family)
    fastmmoe.enable(model, config_of("both"))
    got = generate(model, prompt, prefill_chunk_size=size)

    names = [name for name in prompt if prompt[name].shape == prompt["input_ids"].shape and name != "attention_mask"]
    pictures = {"images": 2, "images_spatial_crop": 1} if family == "deepseek" else {"pixel_values": 1}
    cache, mask = None, prompt["attention_mask"]
    for tokens, end, place in ((slice(size), size, 0), (slice(size, None), None, 1)):
        turn = {name: prompt[name][:, tokens] for name in names}
        for name, each in pictures.items():
            dim = int(family == "deepseek")
            turn[name] = prompt[name].split([each, prompt[name].shape[dim] - each], dim)[place]
        out = model(**turn, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    want = [int(out.logits[0, -1].argmax())]
    while len(want) < got.shape[1]:
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        out = model(input_ids=torch.tensor([want[-1:]]), attention_mask=mask, past_key_values=cache, use_cache=True)
        want.append(int(out.logits[0, -1].argmax()))
    assert got[0].tolist() == want


def test_a_chunk_that_ends_in_a_picture_is_refused_where_tokens_are_pruned(family):
    prompt, behind = prompt_of(family)
    model = fresh(family)
    fastmmoe.enable(model, config_of("prune"))
    with pytest.raises(ValueError, match="ends in a vision token"):
        generate(model, prompt, prefill_chunk_size=behind[0] - 2)
