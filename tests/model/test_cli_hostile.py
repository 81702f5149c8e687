"""The command line under hostile input: every bad input is one line and exit code 2, before work and without traces."""

import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from fastmmoe.families.checkpoint import load_model
from fastmmoe.families.images import open_image
from fastmmoe_cli.outputs import check_writable
from fastmmoe_cli.videos import check_videos, open_videos

from .test_cli import invoke, refused, succeed
from .tiny_checkpoints import save

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save("internvl_qwen3_moe", tmp_path_factory.mktemp("checkpoint"))


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of whole pictures of all kinds, and of what is none."""
    folder = tmp_path_factory.mktemp("pictures")
    image = Image.fromarray(PIXELS)
    image.save(folder / "whole.png")
    image.save(folder / "whole.jpg")
    image.convert("P").save(folder / "palette.png")
    image.convert("1").save(folder / "bits.png")
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    frames = [Image.fromarray(np.roll(PIXELS, 5 * shift, 1)) for shift in range(4)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:], duration=100)
    turned = Image.Exif()
    turned[0x112] = 6
    image.save(folder / "turned.jpg", exif=turned)
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(folder / "16_bits.png")
    image.convert("F").save(folder / "floats.tiff")
    for whole in ("whole.png", "whole.jpg", "moving.gif"):
        content = (folder / whole).read_bytes()
        (folder / f"half_{whole}").write_bytes(content[: len(content) // 2])
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    write_header(folder / "large.png", 10_000, 10_000)
    write_header(folder / "bomb.png", 30_000, 30_000)
    for name, broken in (("broken_frames", "half_whole.png"), ("bomb_frames", "bomb.png")):
        (folder / name).mkdir()
        for number, frame in enumerate(frames):
            frame.save(folder / name / f"{number}.png")
        shutil.copy(folder / broken, folder / name / "2.png")
    return folder


def write_header(path, width, height):
    """A PNG of that size, whose pixels are not there."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(9))), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def run_on(checkpoint, *options):
    return ["run", "--model", checkpoint, "--device", "cpu", "--max-new-tokens", 1, "--json", *options]


# --- pictures and videos ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["palette.png", "bits.png", "alpha.png", "cmyk.jpg", "moving.gif", "turned.jpg"])
def test_pictures_of_other_kinds(pictures, name):
    shown = open_image(pictures / name)
    assert shown.mode == "RGB" and shown.size == ((40, 64) if name == "turned.jpg" else (64, 40))
    if name in ("alpha.png", "cmyk.jpg"):
        assert np.abs(np.asarray(shown, dtype=float) - PIXELS).mean() < (1 if name == "alpha.png" else 60)


BROKEN = {
    "bomb.png": "exceeds limit",
    "large.png": "truncated",  # of a size at which Pillow only warns
    "half_whole.png": "truncated",
    "half_whole.jpg": "truncated",
    "empty.png": "not an image",
    "folder.png": "Is a directory",
    "16_bits.png": "expected 8 bits per channel",
    "floats.tiff": "expected 8 bits per channel",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("command", ["demo", "bench", "run"])
def test_broken_pictures(pictures, tmp_path, command, name):
    path = pictures / name
    options = {"run": ["--model", tmp_path, "--prompt", "Hi"], "demo": ["--output", tmp_path / "o.png"]}
    said = refused(command, "--image", path, *options.get(command, ()))
    assert said.startswith(f"error: --image {path}: ") and BROKEN[name] in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [("bomb.png", "exceeds limit"), ("half_moving.gif", ""), ("broken_frames", "2.png: not an image"),
     ("bomb_frames", "2.png: not an image")],
)  # fmt: skip
def test_broken_videos(pictures, name, says, capfd):
    """Below the processor, which needs torchvision."""
    with pytest.raises(typer.Exit) as raised:
        check_videos([pictures / name])
        open_videos([pictures / name], None)
    assert raised.value.exit_code == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: --video {pictures / name}") and says in said


# --- prompts ----------------------------------------------------------------------------------------------------------

PROMPTS = {"<IMG_CONTEXT>": "holds <IMG_CONTEXT>", "a <video> b": "holds <video>", " ": "expected a question, got ' '",
           "\udcff": "expected text in UTF-8"}  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
def test_prompts(checkpoint, pictures, tmp_path, prompt):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(checkpoint / name, tmp_path)
    shutil.copy(checkpoint / "preprocessor_config.json", tmp_path)
    shutil.copy(checkpoint / "processor_config.json", tmp_path)
    # no weights there, so that none are loaded
    said = refused(*run_on(tmp_path, "--image", pictures / "whole.png", "--prompt", prompt))
    assert f"--prompt: {PROMPTS[prompt]}" in said
    assert f"--prompt: {PROMPTS[prompt]}" in refused("bench", "--image", pictures / "whole.png", "--prompt", prompt)
    output = tmp_path / "o.png"
    assert f"--question: {PROMPTS[prompt]}" in refused("demo", "--question", prompt, "--output", output)
    assert not output.exists()


def test_placeholders_of_another_family(pictures, tmp_path):
    made = save("qwen3_vl_moe", tmp_path)
    for placeholder in ("<|image_pad|>", "<|video_pad|>"):
        options = ["--image", pictures / "whole.png", "--prompt", f"What is {placeholder}?"]
        assert f"--prompt: holds {placeholder}" in refused(*run_on(made, *options))


# --- devices and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", "xla", "hpu", "vulkan", "cuda:77", "cpu:3", "cpu:-1", "nonsense", ""])
@pytest.mark.parametrize("command", ["run", "analyze"])
def test_devices_that_are_not_there(pictures, tmp_path, command, device):
    options = {
        "run": ["--model", tmp_path, "--image", pictures / "whole.png", "--prompt", "Hi"],
        "analyze": ["--model", tmp_path, "--out", tmp_path / "out"],
    }
    assert f"--device {device}: " in refused(command, *options[command], "--device", device)
    assert list(tmp_path.iterdir()) == []


FLOPS = ["flops", "internvl3.5-30b-a3b"]
SERVE = ["serve", "gone", "--dry-run"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*FLOPS, "--text", -1], "--text"),
        ([*FLOPS, "--text", "nan"], "--text"),
        ([*FLOPS, "--text", 0, "--vision", 0], "at least one token"),
        ([*FLOPS, "--retention", "nan", "--prune-layers", 5], "retention: expected a number in (0, 1], got nan"),
        ([*FLOPS, "--retention", "inf", "--prune-layers", 5], "retention: expected a number in (0, 1], got inf"),
        ([*FLOPS, "--retention", "abc"], "--retention"),
        ([*FLOPS, "--retention", 0.5, "--prune-layers", ""], "expected the layers to prune at"),
        ([*FLOPS, "--retention", 0.5, "--prune-layers", "5,5"], "each once"),
        ([*FLOPS, "--retention", 0.5, "--prune-layers=-1"], "--prune-layers[0]: expected an int >= 0"),
        ([*FLOPS, "--retention", 0.5, "--prune-layers", "9" * 30], "the model has 48 layers"),
        ([*FLOPS, "--vision-top-k", 0], "--vision-top-k: expected an int >= 1"),
        ([*FLOPS, "--nosuch"], "--nosuch"),
        ([*FLOPS, "more"], "more"),
        (["flops"], "MODEL"),
        (["--nosuch"], "--nosuch"),
        (["nosuch"], "nosuch"),
        (["run", "--prompt"], "--prompt"),
        (["bench", "--seed", "9" * 20], "--seed"),
        (["bench", "--max-new-tokens", "9" * 20], "--max-new-tokens"),
        (["time", *FLOPS[1:], "--batch", 0], "--batch"),
        (["time", *FLOPS[1:], "--device", "none.json"], "none.json: No such file"),
        ([*SERVE, "--retention", "nan", "--prune-layers", 5], "retention: expected a number in (0, 1], got nan"),
        ([*SERVE, "--prune-layers", 5], "gone"),
        (["analyze", "--out", "x", "--parts", ","], "parts: expected some of"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_numbers_and_options(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert says in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"\xff", "not JSON"), (b"[" * 100_000, "not JSON"), ({"flops": 10**400}, "flops: expected a number <="),
     ({"launch": 1e308}, "launch: expected a number <="), ({"launch": float("nan")}, "launch: expected a number >="),
     ({"bytes": -1}, "bytes: expected a number >="), ({"bytes": None}, "bytes: expected a number >=")],
    ids=["bytes", "deep", "huge", "slow", "nan", "negative", "null"],
)  # fmt: skip
def test_ceilings(tmp_path, content, says):
    good = {"name": "x", "flops": 1e12, "bytes": 1e11, "launch": 1e-6, "dtype": "bfloat16", "source": "me"}
    path = tmp_path / "c.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(good | content).encode())
    assert says in refused("time", *FLOPS[1:], "--device", path)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def copy(checkpoint, directory):
    return shutil.copytree(checkpoint, directory / "copy")


def edit_config(checkpoint, **text):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= text
    path.write_text(json.dumps(config))


def edit_weights(checkpoint, edit):
    path = checkpoint / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})


def cut(path, size=None):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if size is None else size])


def shard(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00002-of-00002.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_weights(checkpoint, index=None):
    """With an index that names them, or by the name they have without one."""
    weights, name = load_file(checkpoint / WEIGHTS), "shard.bin" if index else "pytorch_model.bin"
    torch.save(weights, checkpoint / name)
    if index is None:
        (checkpoint / WEIGHTS).unlink()
        return
    (checkpoint / WEIGHTS).rename(checkpoint / "other.safetensors")
    (checkpoint / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))


def name_weights(checkpoint, name):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": name}))


WEIGHTS = "model.safetensors"
CHECKPOINTS = {
    "cut": (lambda c: cut(c / WEIGHTS), "model.safetensors: not a whole file of weights"),
    "no bytes": (lambda c: cut(c / WEIGHTS, 0), "model.safetensors: not a whole file of weights"),
    "no weights": (lambda c: (c / WEIGHTS).unlink(), "no file named model.safetensors"),
    "pickled": (pickle_weights, "its weights are pickled (pytorch_model.bin)"),
    "pickled shards": (lambda c: pickle_weights(c, f"{WEIGHTS}.index.json"), "its weights are pickled (shard.bin)"),
    "pickled shards of another index": (
        lambda c: (pickle_weights(c, "a.safetensors.index.json"), name_weights(c, "a.safetensors.index.json")),
        "its weights are pickled (shard.bin)",
    ),
    "pickled, named by the config": (
        lambda c: name_weights(c, "adapter_model.bin"), "its weights are pickled (adapter_model.bin)"
    ),
    "no shard": (shard, "model-00002-of-00002.safetensors"),
    "missing": (
        lambda c: edit_weights(c, lambda found: {name: w for name, w in found.items() if "layers.3." not in name}),
        "missing (model.language_model.layers.3.input_layernorm.weight",
    ),
    "left over": (
        lambda c: edit_weights(c, lambda found: found | {"more.weight": torch.ones(2)}), "1 left over (more.weight)"
    ),
    "other sizes": (lambda c: edit_config(c, hidden_size=64), "lm_head.weight: (327, 32), not (327, 64)"),
    "more layers": (lambda c: edit_config(c, num_hidden_layers=14, layer_types=None), "layers.13."),
    "no number": (lambda c: edit_config(c, hidden_size="big"), "hidden_size"),
    "below 0": (lambda c: edit_config(c, hidden_size=-4), "negative dimension"),
    "unknown": (lambda c: edit_config(c, model_type="nosuch"), "nosuch"),
    "no JSON": (lambda c: (c / "config.json").write_text("{"), "not a valid JSON"),
    "no UTF-8": (lambda c: (c / "config.json").write_bytes(b"\xff"), "not a valid JSON"),
    "no config": (lambda c: (c / "config.json").unlink(), "Unrecognized model"),
    "no tokenizer": (lambda c: [file.unlink() for file in c.glob("tokenizer*")], "start_image_token"),
    "tokenizer of no JSON": (lambda c: (c / "tokenizer.json").write_text("{"), "copy: "),
    "no processor": (lambda c: [file.unlink() for file in c.glob("*processor*")], "preprocessor_config.json"),
    "nothing": (lambda c: [file.unlink() for file in c.iterdir()], "Unrecognized model"),
    "a file": (lambda c: (shutil.rmtree(c), c.write_text("x")), "no such directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_broken_checkpoints(checkpoint, pictures, tmp_path, case):
    broken, (damage, says) = copy(checkpoint, tmp_path), CHECKPOINTS[case]
    damage(broken)
    output = tmp_path / "o.png"
    options = ["--image", pictures / "whole.png", "--prompt", "Hi", "--output", output]
    said = refused(*run_on(broken, *options))
    assert says in said and "--model" in said and not output.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_nothing_that_a_checkpoint_brings_is_run(checkpoint, pictures, tmp_path, file):
    """Even for a user who would answer yes: nobody is asked."""
    brings, marker = copy(checkpoint, tmp_path), tmp_path / "was run"
    (brings / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own:\n    pass\n")
    path = brings / file
    values = json.loads(path.read_text()) if path.exists() else {}
    classes = ("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoModelForImageTextToText")
    values["auto_map"] = dict.fromkeys(classes, "code.Own") | {"AutoTokenizer": ["code.Own", "code.Own"]}
    values |= {name: "Own" for name in ("processor_class", "tokenizer_class", "image_processor_type") if name in values}
    if file == "config.json":
        values["model_type"] = "own"
    path.write_text(json.dumps(values))
    options = ["--image", pictures / "whole.png", "--prompt", "Hi", "--max-new-tokens", 1]
    done = invoke(*run_on(brings, *options), typed="y\n" * 10)
    assert not marker.exists()
    assert done.exit_code == 0 or "brings code of its own, which is not run" in done.stderr
    assert done.exit_code or file == "tokenizer_config.json"  # whose class is known by the model's


@pytest.mark.parametrize("values", [{"hidden_size": "big"}, {"hidden_size": -4}, {"num_hidden_layers": 0}], ids=str)
@pytest.mark.parametrize("command", ["flops", "time"])
def test_sizes_that_make_no_model(checkpoint, tmp_path, command, values):
    broken = copy(checkpoint, tmp_path)
    edit_config(broken, **values)
    assert "hidden_size" in refused(command, broken)


def test_tied_weights_are_whole(checkpoint, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    assert load_model(str(tmp_path)).lm_head.weight is not None


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_pipe_is_no_output(tmp_path):
    """To open one would wait for a reader."""
    os.mkfifo(tmp_path / "pipe.png")
    assert "expected a file, got a pipe" in refused("demo", "--output", tmp_path / "pipe.png")


@pytest.mark.parametrize("command", ["demo", "bench", "time", "run"])
def test_outputs_are_tried_before_work(command, pictures, tmp_path):
    options = {"run": ["--model", tmp_path / "gone", "--prompt", "Hi", "--image", pictures / "whole.png"]}
    options["time"] = ["internvl3.5-30b-a3b"]
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "round.png").symlink_to("round.png")
    for path in (tmp_path / "folder.png", tmp_path / "round.png", Path("/proc/picture.png"), tmp_path / "no" / "a.png"):
        said = refused(command, *options.get(command, ()), "--output", path)
        assert said.startswith(f"error: --output {path}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "round.png"]


def test_trying_leaves_nothing_and_keeps_what_is_there(tmp_path):
    there, gone, link = tmp_path / "there.png", tmp_path / "gone.png", tmp_path / "link.png"
    there.write_bytes(b"picture")
    link.symlink_to(gone)
    for path in (there, gone, link):
        check_writable("--output", path)
    assert there.read_bytes() == b"picture" and not gone.exists() and link.is_symlink()


def test_figures_are_printed_before_a_picture_fails(tmp_path):
    full = tmp_path / "full.png"
    full.symlink_to("/dev/full")
    for command in (["time", *FLOPS[1:]], ["demo", "--question", "how many digits ?"]):
        result = invoke(*command, "--output", full, "--json")
        assert result.exit_code == 1 and json.loads(result.stdout)
        assert result.stderr == f"error: --output {full}: could not be written: No space left on device\n"


def test_a_picture_one_pixel_high_is_drawn(tmp_path):
    Image.new("RGB", (4000, 1)).save(tmp_path / "thin.png")
    output = tmp_path / "o.png"
    succeed("demo", "--image", tmp_path / "thin.png", "--question", "how many digits ?", "--output", output, "--json")
    assert output.exists()


# --- whole processes --------------------------------------------------------------------------------------------------


def start(*arguments, **streams):
    command = [sys.executable, "-m", "fastmmoe_cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **streams)


def test_a_reader_that_has_gone():
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*FLOPS, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert process.communicate()[1] == b"" and process.returncode == 1


def _read(terminal):
    """What was written; nothing once no process has it open."""
    try:
        return os.read(terminal, 10_000)
    except OSError:
        return b""


def test_a_terminal_is_asked_before_results_are_overwritten(tmp_path):
    path = tmp_path / "methods.json"
    path.write_text("results")
    ours, theirs = pty.openpty()
    process = start("analyze", "--out", tmp_path, "--parts", "methods", stdin=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, b"n\n")
    said = b"".join(iter(partial(_read, ours), b""))  # one that nobody reads makes the writer wait
    assert process.wait() == 1 and b"holds an earlier run's methods. Overwrite?" in said
    assert b"importing torch and transformers" in said
    os.close(ours)
    assert path.read_text() == "results"
