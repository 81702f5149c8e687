"""Checkpoint directories with the families' own processors: pictures, videos, and the commands on them.

What needs torchvision is skipped where that is missing; what is refused without it is tested there.
"""

import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.utils import is_torchvision_available

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.families import find_text_model, processors
from fastmmoe.families.chat import build_inputs
from fastmmoe.families.images_only import images_only
from fastmmoe.families.processors import load_processor, tilings
from fastmmoe.study.prompts import encode
from fastmmoe.study.questions import Example
from fastmmoe_cli import videos

from .test_cli import invoke, refused, succeed
from .tiny_checkpoints import CHECKPOINTS, NEED_TORCHVISION, TOKEN, save

HAS_TORCHVISION = is_torchvision_available()
WITH_PICTURES = [name for name in CHECKPOINTS if HAS_TORCHVISION or name not in NEED_TORCHVISION]
OF_VIDEOS = [name for name in CHECKPOINTS if name not in ("internvl_qwen3_moe", "mistral3_mistral4")]
GRIDS = [name for name in WITH_PICTURES if name in OF_VIDEOS]  # the same families say how many patches there are
needs_torchvision = pytest.mark.skipif(not HAS_TORCHVISION, reason="needs torchvision")
without_torchvision = pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is there")
PROMPT = "What is in this picture?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def loaded(checkpoint):
    made = {}

    def get(name):
        if name not in made:
            directory = checkpoint(name)
            model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
            made[name] = model, load_processor(str(directory))
        return made[name]

    return get


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture of noise, 8 x 5 tokens of a grid."""
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (5 * TOKEN, 8 * TOKEN, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def frames(count=6):
    """A red square that moves to the right over grey, 64 x 48 pixels."""
    shown = []
    for step in range(count):
        pixels = np.full((48, 64, 3), 128, np.uint8)
        pixels[16:32, 6 * step : 6 * step + 16] = (255, 0, 0)
        shown.append(Image.fromarray(pixels))
    return shown


@pytest.fixture(scope="module")
def animation(tmp_path_factory):
    """1.5 seconds, 4 frames a second."""
    path = tmp_path_factory.mktemp("video") / "square.gif"
    first, *others = frames()
    first.save(path, save_all=True, append_images=others, duration=250, loop=0)
    return path


# --- processors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_a_checkpoints_processor_is_the_one_it_names(loaded, name):
    model, processor = loaded(name)
    assert type(processor).__name__ == CHECKPOINTS[name].image["processor_class"]
    kind = type(processor.image_processor).__name__
    assert kind.startswith(CHECKPOINTS[name].image["image_processor_type"].removesuffix("Fast"))
    assert kind.endswith("Pil") != HAS_TORCHVISION
    assert processor.tokenizer.decode(processor.tokenizer(PROMPT)["input_ids"]) == PROMPT
    inputs = build_inputs(model, processor, [Image.new("RGB", (100, 60))], PROMPT)
    ids = [getattr(model.config, next(iter(CHECKPOINTS[name].ids)))]
    assert torch.isin(inputs["input_ids"], torch.tensor(ids)).sum() > 16
    assert PROMPT in processor.decode(inputs["input_ids"][0])


@without_torchvision
@pytest.mark.parametrize("name", NEED_TORCHVISION)
def test_a_processor_that_needs_torchvision_says_so(checkpoint, name):
    with pytest.raises(ImportError, match="without torchvision: install the torchvision that matches torch 2"):
        load_processor(str(checkpoint(name)))


def test_a_directory_without_a_processor_says_so(checkpoint, tmp_path):
    config = (checkpoint("qwen3_vl_moe") / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(OSError, match=str(tmp_path)):
        load_processor(str(tmp_path))


@pytest.mark.parametrize("name", ["qwen3_omni_moe", "dots3_note"])
def test_the_video_part_is_left_out_wherever_it_stands(name):
    """One class hands its parts on by position and has the video part in front, the other does so by name."""
    module = importlib.import_module(f"transformers.models.{name}.processing_{name}")
    processor_class = getattr(module, name.title().replace("_", "") + "Processor")
    kind = images_only(processor_class)
    assert kind.__name__ == processor_class.__name__
    parts = processor_class.get_attributes()
    assert "video_processor" in parts
    assert kind.get_attributes() == [part for part in parts if part != "video_processor"]
    handed = {}

    class Part:
        chat_template = None

        def convert_tokens_to_ids(self, token):
            return 0

        def __getattr__(self, name):
            if name.endswith(("_token", "token_id")):
                return name
            raise AttributeError(name)

    class Watched(kind):
        def check_argument_for_proper_class(self, name, part):
            handed[name] = part

        def __repr__(self):  # which transformers logs
            return "watched"

    given = {name: Part() for name in Watched.get_attributes()}
    made = Watched.from_args_and_dict(list(given.values()), {})
    assert handed == given and all(getattr(made, name) is part for name, part in given.items())


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_PICTURES)
@torch.no_grad()
def test_the_tokens_laid_out_are_those_of_the_report(loaded, name):
    model, processor = loaded(name)
    images = [Image.new("RGB", size) for size in ((100, 60), (40, 70), (64, 64))]
    inputs = build_inputs(model, processor, images, PROMPT)
    cut = tilings(model.config, processor, images, inputs)
    with fastmmoe.enabled(model, FastMMoEConfig.preset(model, retention=0.5)):
        model(**inputs)
        report = fastmmoe.report(model)
    assert sum(tiling.n_tokens for tiling in cut) == report.n_vision[0]
    assert all(np.unique(tiling.image).size == tiling.image.size for tiling in cut)
    assert cut[0].image.shape[1] > cut[0].image.shape[0] and cut[1].image.shape[1] < cut[1].image.shape[0]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 5), (4, 7), (3, 2)])
@torch.no_grad()
def test_tokens_lie_where_the_vision_tower_saw_them(loaded, name, row, column):
    """Paint one token's part of an image and see which token changes most."""
    model, processor = loaded(name)
    before = np.random.default_rng(2).integers(100, 156, (5 * TOKEN, 8 * TOKEN, 3), dtype=np.uint8)
    after = before.copy()
    after[TOKEN * row : TOKEN * (row + 1), TOKEN * column : TOKEN * (column + 1)] = (255, 0, 0)
    features = []
    for pixels in (before, after):
        image = Image.fromarray(pixels)
        inputs = build_inputs(model, processor, [image], "?")
        (tiling,) = tilings(model.config, processor, [image], inputs)
        found = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        features.append(torch.cat(tuple(found.pooler_output)))
    change, _ = tiling.grids((features[1] - features[0]).norm(dim=-1).numpy())
    assert change.shape == (5, 8) and tiling.covered == (0, 0, 1, 1)
    assert np.unravel_index(change.argmax(), change.shape) == (row, column)


@needs_torchvision
def test_borders_on_the_right_and_at_the_bottom_are_told(loaded):
    model, processor = loaded("kimi_k25")
    image = Image.new("RGB", (60, 35))
    inputs = build_inputs(model, processor, [image], "?")
    (tiling,) = tilings(model.config, processor, [image], inputs)
    assert tiling.image.shape == (5, 8) and tiling.covered == (0, 0, 60 / 64, 35 / 40)


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_run_asks_a_checkpoint_and_draws(checkpoint, picture, tmp_path, name):
    output = tmp_path / "fate.png"
    options = ["--image", picture, "--image", picture, "--prompt", PROMPT, "--max-new-tokens", 3, "--device", "cpu"]
    run = ["run", "--model", checkpoint(name), *options, "--dtype", "float32", "--json"]
    figures = json.loads(succeed(*run, "--output", output))
    report = figures["report"]
    assert report["stages"] and report["stages"][-1]["dropped"][0] > 0
    assert figures["config"]["prune_layers"] == [stage["layer"] for stage in report["stages"]]
    assert len(report["n_vision"]) == 1 and report["n_vision"][0] >= 80
    with Image.open(output) as drawn:
        assert drawn.width == 1920
    full = json.loads(succeed(*run, "--retention", 1, "--vision-top-k", 4))
    assert full["answers"]["dense"] == full["answers"]["fastmmoe"] == figures["answers"]["dense"]


@without_torchvision
def test_what_needs_torchvision_is_one_line(checkpoint, picture, animation):
    common = ["--prompt", PROMPT, "--device", "cpu"]
    line = refused("run", "--model", checkpoint("kimi_k25"), "--image", picture, *common)
    assert "without torchvision" in line and "pytorch.org" in line
    line = refused("run", "--model", checkpoint("qwen3_vl_moe"), "--video", animation, *common)
    assert "no processor for videos without torchvision" in line and "pytorch.org" in line


def test_videos_that_cannot_be_asked_about_are_one_line(checkpoint, picture, animation, tmp_path, monkeypatch):
    run = ["run", "--model", checkpoint("qwen3_vl_moe"), "--prompt", PROMPT, "--device", "cpu"]
    assert "expected at least one, or a --video" in refused(*run)
    assert "missing.gif: No such file" in refused(*run, "--video", tmp_path / "missing.gif")
    assert "single picture" in refused(*run, "--video", picture)
    assert "a picture shows images alone" in refused(*run, "--video", animation, "--output", tmp_path / "fate.png")
    (tmp_path / "frames").mkdir()
    assert "it has 0" in refused(*run, "--video", tmp_path / "frames")
    film = tmp_path / "film.mp4"
    film.write_bytes(b"no film")
    monkeypatch.setattr(videos, "missing_of", list)
    assert "film.mp4: to decode it, pip install av" in refused(*run, "--video", film)
    run[2] = checkpoint("internvl_qwen3_moe")
    assert "takes none here" in refused(*run, "--video", animation)


@needs_torchvision
@pytest.mark.parametrize("name", OF_VIDEOS)
@pytest.mark.parametrize("form", ["animation", "directory", "film"])
def test_run_asks_about_a_video(checkpoint, animation, tmp_path, name, form):
    path = animation
    if form == "directory":
        path = tmp_path
        for number, frame in enumerate(frames()):
            frame.save(path / f"{number:03}.png")
    if form == "film":
        path = tmp_path / "film.mp4"
        write_film(path, frames(12), rate=4)
    run = ["run", "--model", checkpoint(name), "--prompt", PROMPT, "--max-new-tokens", 3, "--device", "cpu"]
    run += ["--dtype", "float32", "--video", path, "--json"]
    figures = json.loads(succeed(*run))
    report = figures["report"]
    # 2 frames a second, of 48 tokens or as many as fit
    assert report["stages"][-1]["dropped"][0] > 0 and report["n_vision"][0] >= 24
    full = json.loads(succeed(*run, "--retention", 1, "--vision-top-k", 4))
    assert full["answers"]["dense"] == full["answers"]["fastmmoe"] == figures["answers"]["dense"]


@needs_torchvision
def test_images_beside_videos(checkpoint, picture, animation):
    common = ["--image", picture, "--video", animation, "--video", animation, "--prompt", PROMPT, "--device", "cpu"]
    common += ["--max-new-tokens", 2, "--json"]
    figures = json.loads(succeed("run", "--model", checkpoint("qwen3_vl_moe"), *common))
    alone = json.loads(succeed("run", "--model", checkpoint("qwen3_vl_moe"), *common[2:]))
    assert figures["report"]["n_vision"][0] == alone["report"]["n_vision"][0] + 40
    # its frames have the images' token, and its model in transformers 5.23 takes one kind at a time
    result = invoke("run", "--model", checkpoint("glm4v_moe"), *common)
    line = result.stderr.splitlines()[-1]  # behind the progress of loading
    assert result.exit_code == 2 and "refuses this prompt" in line and "do not match" in line


def write_film(path, shown, rate):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *shown[0].size, "yuv420p"
        for frame in shown:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


@pytest.mark.parametrize("name", ["qwen3_vl_moe"])
def test_what_the_processor_makes_no_vision_tokens_of_is_refused(loaded, name, monkeypatch):
    model, processor = loaded(name)
    monkeypatch.setattr(find_text_model(model)[0].__class__, "find_vision", lambda *_: None)
    with pytest.raises(ValueError, match="made no vision tokens"):
        encode(model, processor, [Example(Image.new("RGB", (64, 64)), PROMPT, "?")])


def test_the_loader_asks_torchvision_once(monkeypatch, checkpoint):
    """With torchvision the processor is transformers' own, videos and all."""
    seen = []

    def load(path, *, trust_remote_code):
        seen.append(trust_remote_code)
        return "processor"

    monkeypatch.setattr(processors, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(processors.AutoProcessor, "from_pretrained", load)
    assert load_processor(str(checkpoint("qwen3_vl_moe"))) == "processor" and seen == [False]
