"""Videos: frames as the families' processors lay them out, with timestamps as text between them.

Every frame is a run of vision tokens of its own. A batch is compared with the stock model where nothing is reduced, and
with the loop of `naive_loop.py` where tokens are pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.families import FAMILIES, find_text_model
from fastmmoe_kernels import VisionLayout

from . import naive_loop, tiny_families
from .families import LOOPS
from .test_parity_families import configs, extended, padded, settings_of
from .tiny_families import END, IMAGE, START, VIDEO

WINDOW = 3
ANSWER = 3
TIME = 30  # the id of a timestamp's text, counted up
GRIDS = {"image": (1, 4, 6), "long": (3, 4, 8), "wide": (2, 2, 10)}  # in time, height and width; 2 x 2 make a token


@dataclass(frozen=True)
class Layout:
    """How a family puts a video into a prompt.

    Attributes:
        frame: (ids of the timestamp, tokens per frame) -> ids of one frame.
        token: id of a frame's vision tokens.
        pixels: (patches) -> the shape of their pixel values.
        around: ids in front of a video and behind it.
        token_types: the processor returns `mm_token_type_ids`: 1 for an image's tokens, 2 for a video's.
        images: a prompt may hold images beside videos.
        by_frame: each frame has a row of its own in `video_grid_thw`.
    """

    frame: Callable[[int, int], list[int]]
    pixels: Callable[[int], tuple[int, ...]]
    token: int = VIDEO
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    token_types: bool = True
    images: bool = True
    by_frame: bool = False


def _boxed(token: int) -> Callable[[int, int], list[int]]:
    return lambda time, count: [time, time + 1, START, *[token] * count, END]


QWEN = Layout(_boxed(VIDEO), lambda n: (n, 3 * 2 * 4 * 4), around=((START,), (END,)))
LAYOUTS = {
    # <|vision_start|> <0.2 seconds> <|vision_start|> frame <|vision_end|> <1.2 seconds> ... <|vision_end|>
    "qwen3_vl_moe": QWEN,
    "qwen3_5_moe": QWEN,
    # <|begin_of_video|> <|begin_of_image|> frame <|end_of_image|> 0 <|begin_of_image|> ... <|end_of_video|>
    "glm4v_moe": Layout(
        lambda time, count: [START, *[IMAGE] * count, END, time],
        lambda n: (n, 3 * 2 * 4 * 4),
        token=IMAGE,
        around=((87,), (88,)),
        images=False,
    ),
    # 00:00:01.000 <|media_begin|> video <|media_content|> frame <|media_end|> 00:00:02.000 ...
    "kimi_k25": Layout(
        lambda time, count: [time, time + 1, START, 60, 61, *[VIDEO] * count, END],
        lambda n: (n, 3, 4, 4),
        token_types=False,
        by_frame=True,
    ),
}


def sample(name: str, parts: list[str | int], seed: int) -> tuple[dict[str, torch.Tensor], list[range]]:
    """(inputs of a prompt, every frame's places in it); its parts are text ids, "image", or a video in `GRIDS`."""
    layout, generator = LAYOUTS[name], torch.Generator().manual_seed(seed)
    ids, kinds, runs, clock = [], [], [], TIME
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}

    def say(tokens: list[int], vision: int = -1, kind: int = 0) -> None:
        places = [len(ids) + i for i, token in enumerate(tokens) if token == vision]
        kinds.extend(kind if token == vision else 0 for token in tokens)
        ids.extend(tokens)
        if places:
            runs.append(range(places[0], places[-1] + 1))

    for part in parts:
        if isinstance(part, int):
            say([part])
            continue
        time, height, width = GRIDS[part]
        count = height * width // 4
        if part == "image":
            say([START, *[IMAGE] * count, END], IMAGE, 1)
            grids["image"].append(GRIDS[part])
            continue
        say(list(layout.around[0]))
        for _ in range(time):
            say(layout.frame(clock, count), layout.token, 2)
            clock += 1
        say(list(layout.around[1]))
        grids["video"] += [(1, height, width)] * time if layout.by_frame else [GRIDS[part]]

    inputs = {"input_ids": torch.tensor([ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if layout.token_types:
        inputs["mm_token_type_ids"] = torch.tensor([kinds], dtype=torch.int32)
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
            n = int(inputs[f"{kind}_grid_thw"].prod(-1).sum())
            inputs[pixels] = torch.randn(layout.pixels(n), generator=generator)
    return inputs, runs


def samples(name: str) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]], list[list[range]]]:
    """(model, two prompts alone, their frames)."""
    model, _ = tiny_families.FAMILIES[name]()
    beside = ["image"] if LAYOUTS[name].images else []
    texts = [[5, 6, *beside, 7, "long", 8, 9], [5, 6, 31, *beside, "wide", 17, "long", 18, 19, 20]]
    made = [sample(name, parts, seed) for seed, parts in enumerate(texts, 3)]
    return model, [inputs for inputs, _ in made], [runs for _, runs in made]


def mask_of(runs: list[range], n: int, offset: int = 0) -> torch.Tensor:
    """bool [n]: the places of the frames, moved by an offset."""
    mask = torch.zeros(n, dtype=torch.bool)
    for run in runs:
        mask[run.start + offset : run.stop + offset] = True
    return mask


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_families_say_that_they_take_videos(name):
    model, _, _ = samples(name)
    assert find_text_model(model)[0].videos
    assert {family.parent_type for family in FAMILIES if family.videos} >= {model.config.model_type}


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_the_vision_tokens_of_every_frame_are_found(name):
    model, alone, frames = samples(name)
    batch = padded(alone)
    n = batch["input_ids"].shape[1]
    family, _, parent = find_text_model(model)
    want = torch.stack(
        [mask_of(runs, n, n - one["input_ids"].shape[1]) for one, runs in zip(alone, frames, strict=True)]
    )
    found = family.find_vision(parent, batch)
    assert torch.equal(found, want)

    # the frames are the layout's runs, and no window lies in two of them
    layout = VisionLayout.from_mask(found, batch["attention_mask"].bool())
    for row, (one, runs) in enumerate(zip(alone, frames, strict=True)):
        offset = n - one["input_ids"].shape[1]
        places = [place for run in runs for place in run]
        frame_of = {place: number for number, run in enumerate(runs) for place in run}
        windows = layout.windows(WINDOW)[row]
        assert [len({frame_of[i - offset] for i in window}) for window in windows] == [1] * len(windows)
        assert len(windows) == sum(-(-len(run) // WINDOW) for run in runs)
        assert found[row].nonzero()[:, 0].tolist() == [place + offset for place in places]

    with fastmmoe.enabled(model, FastMMoEConfig(prune_layers=LOOPS[name].prune_layers, retention=0.5, window=WINDOW)):
        model(**batch)
        report = fastmmoe.report(model)
    assert report.n_vision == tuple(sum(map(len, runs)) for runs in frames)
    assert report.n_text == tuple(
        one["input_ids"].shape[1] - count for one, count in zip(alone, report.n_vision, strict=True)
    )
    for fates in report.stages[0].fate, report.stages[-1].fate:
        assert [len(fate) for fate in fates] == list(report.n_vision)


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_nothing_reduced_is_the_stock_model(name):
    model, alone, _ = samples(name)
    batch = padded(alone)
    generate = dict(do_sample=False, min_new_tokens=ANSWER, max_new_tokens=ANSWER, output_logits=True)
    generate |= dict(return_dict_in_generate=True)
    stock, answer = model(**batch).logits, model.generate(**batch, **generate)
    config = FastMMoEConfig(vision_top_k=4, reduction_layer=0, prune_layers=LOOPS[name].prune_layers, retention=1.0)
    with fastmmoe.enabled(model, config):
        got, said = model(**batch).logits, model.generate(**batch, **generate)
        n_vision = fastmmoe.report(model).n_vision
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(got[valid], stock[valid], rtol=0, atol=LOOPS[name].tolerance)
    assert torch.equal(said.sequences, answer.sequences) and min(n_vision) >= 24
    torch.testing.assert_close(said.logits, answer.logits, rtol=0, atol=LOOPS[name].tolerance)
    assert torch.equal(model(**batch).logits, stock)


@pytest.mark.parametrize("kind", ["experts", "pruning", "merging"])
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_a_batch_of_videos_equals_the_loop(name, kind):
    model, alone, frames = samples(name)
    config, loop = configs(name)[kind], LOOPS[name]
    batch = padded(alone)
    n_batch = batch["input_ids"].shape[1]
    generate = dict(
        do_sample=False, min_new_tokens=ANSWER, max_new_tokens=ANSWER, return_dict_in_generate=True,
        output_logits=True, suppress_tokens=[*range(IMAGE, tiny_families.VOCABULARY)],
    )  # fmt: skip
    with fastmmoe.enabled(model, config):
        prompt = model(**batch).logits
        lengths = fastmmoe.report(model).tokens_per_layer
        said = model.generate(**batch, **generate)
    margins = []
    for row, (inputs, runs) in enumerate(zip(alone, frames, strict=True)):
        n = inputs["input_ids"].shape[1]
        answer = said.sequences[row : row + 1, n_batch:-1]
        vision = [*mask_of(runs, n).tolist(), *[False] * answer.shape[1]]
        stretches = [n, *[1] * answer.shape[1]]
        given = model, loop.parts, settings_of(config), extended(inputs, answer), vision, stretches
        if kind == "experts":
            kept, logits = torch.arange(n), naive_loop.run_whole(*given)
        else:
            want = naive_loop.run(*given)
            margins += want.margins
            assert [tokens[row] for tokens in lengths] == want.lengths
            kept, logits = torch.tensor(want.kept[0]), want.logits
        torch.testing.assert_close(prompt[row, n_batch - n + kept], logits[0], rtol=0, atol=loop.tolerance)
        for step, expected in enumerate(logits):
            torch.testing.assert_close(said.logits[step][row], expected[-1], rtol=0, atol=loop.tolerance)
    assert min(margins, default=1) > 1e-5, "choices that a rounding error could flip: take another seed"
