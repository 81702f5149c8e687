"""The command line, end to end: figures that add up, pictures that open, and one clear line for bad input."""

import importlib.metadata
import importlib.util
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from fastmmoe.families.chat import build_inputs
from fastmmoe.families.internvl_random import random_model, save_random_model
from fastmmoe.models.deepseek_vl2 import DeepseekVLV2ImageProcessor, DeepseekVLV2Processor
from fastmmoe.scenes import CHECKPOINT, EXAMPLE
from fastmmoe.scenes.demo import demo_config, demo_example, demo_model
from fastmmoe_cli.app import app
from fastmmoe_cli.ask import show
from fastmmoe_cli.bench import PROMPT, cat_photograph
from fastmmoe_cli.compare import compare

from .families import TINY
from .golden import golden
from .tiny_deepseek import tiny_deepseek_vl2

# one tile, no thumbnail: 256 vision tokens keep these tests short
ONE_TILE = (448, 448)
FITTED = (
    "note: the preset's prune layers do not fit a model of 8 layers; taken at the same shares of its depth: 1, 2, 3 "
    "(--prune-layers says others)\n"
)


def invoke(*arguments, typed=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)


def succeed(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result.stdout


def refused(*arguments):
    """The one line of an invocation that exits with code 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, f"{result.exit_code}: {result.output} {result.exception!r}"
    assert "Traceback" not in result.output and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "cat.png"
    cat_photograph().resize(ONE_TILE).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("checkpoint") / "demo")


def flops_of(*options):
    options = ["internvl3.5-30b-a3b", "--text", 100, "--vision", 1792, *options]
    return json.loads(succeed("flops", *options, "--json"))


def test_flops_by_hand():
    """The three figures of the method's definition."""
    experts = flops_of("--vision-top-k", 4)
    assert f"{experts['dense'] / 1e12:.2f}" == "11.74"
    assert f"{experts['saved']:.1%}" == "26.5%"
    both = flops_of("--vision-top-k", 4, "--reduction-layer", 2, "--prune-layers", "5,8,12", "--retention", 0.5)
    assert f"{both['saved']:.1%}" == "56.7%"
    assert both["config"]["prune_layers"] == [5, 8, 12]
    assert sum(layer["reduced"] for layer in both["per_layer"]) == pytest.approx(both["reduced"])
    assert both["saved"] == pytest.approx(1 - both["reduced"] / both["dense"])


def test_flops_table_and_hub_name():
    name = "OpenGVLab/InternVL3_5-30B-A3B-HF"
    out = succeed("flops", name, "--vision-top-k", 4, "--prune-layers", "5,8,12", "--retention", 0.5)
    last = next(line for line in out.splitlines() if "all" in line)
    assert "11.74" in last and "5.08" in last and "56.7%" in last
    assert "13 to 47" in out


def test_flops_prune_at_the_presets_layers():
    given = ["--retention", 0.5, "--vision-top-k", 4]
    assert flops_of(*given) == flops_of(*given, "--prune-layers", "5,8,12")
    shallow = invoke("flops", CHECKPOINT, "--retention", 0.5, "--json")
    config = json.loads(shallow.stdout)["config"]
    assert config["prune_layers"] == [1, 2, 3] and config["vision_top_k"] is None and shallow.stderr == FITTED


@pytest.mark.parametrize("command", ["flops", "time"])
def test_that_nothing_is_reduced_is_said(command):
    said = "\nNothing is reduced: --vision-top-k, --retention and --prune-layers say what is.\n"
    reducing = (["--vision-top-k", 4], ["--retention", 0.5], ["--prune-layers", "5,8", "--retention", 0.9])
    nothing = [[], ["--vision-top-k", 8]]
    if command == "flops":  # the launches of pruning nothing take time
        nothing.append(["--retention", 0.5, "--vision", 0])
    for options in (*reducing, *nothing):
        out = succeed(command, "internvl3.5-30b-a3b", *options)
        assert (said in out) == (options in nothing)
        assert command == "flops" or (" expected: " in out) == (options in reducing)


def test_flops_of_a_checkpoint_directory(tmp_path):
    random_model().config.save_pretrained(tmp_path)
    figures = json.loads(succeed("flops", tmp_path, "--text", 85, "--vision", 1792, "--json"))
    # 16 layers, hidden 256, 8 heads of 32, 2 key heads, 16 experts of 128, 4 active
    n = 85 + 1792
    attention = 2 * n * 256 * 2 * (256 + 64) + 2 * n * n * 256
    assert figures["dense"] == 16 * (attention + 2 * n * 256 * 16 + 6 * 256 * 128 * 4 * n)
    assert figures["saved"] == 0


def test_demo(tmp_path):
    """The trained model answers about its picture, both ways, and most answers are right."""
    output = tmp_path / "demo.png"
    figures = json.loads(succeed("demo", "--output", output, "--json"))
    answers = figures["answers"]
    assert len(answers) == 11
    for way in ("dense", "fastmmoe"):
        assert sum(answer[way] == answer["right"] for answer in answers) >= 8
    report = figures["report"]
    assert report["n_vision"] == [100] and report["tokens_per_layer"][-1] == [report["n_text"][0] + 49]
    assert 0.3 < report["flops"]["saved"] < 0.6
    assert figures["picture"] == str(output)
    with Image.open(output) as image:
        assert image.format == "PNG" and image.width == 1920


def test_demo_takes_questions_and_pictures(tmp_path, picture):
    output = tmp_path / "demo.png"
    out = succeed("demo", "--question", "how many digits ?", "--output", output)
    assert "how many digits ?" in out and "right answer" in out and output.exists()
    options = ["--image", picture, "--question", "digit at r1 c1 ?", "--retention", 1, "--output", output, "--json"]
    figures = json.loads(succeed("demo", *options))
    assert [answer["right"] for answer in figures["answers"]] == [None]
    assert figures["picture"] is None and figures["report"]["stages"] == []


def test_bench(tmp_path):
    """The command as it is meant to be used: the photograph, its seven tiles, both answers and the picture."""
    output = tmp_path / "demo.png"
    figures = json.loads(succeed("bench", "--output", output, "--max-new-tokens", 2, "--json"))
    assert figures["picture"] == str(output)
    with Image.open(output) as image:
        assert image.format == "PNG" and image.width == 1920 and image.height > 900
    report = figures["report"]
    assert report["n_vision"] == [1792]
    entering = 1792
    for stage, layer in zip(report["stages"], (5, 8, 12), strict=True):
        target = int(entering * 0.5 ** (1 / 3))
        assert (stage["layer"], stage["entering"]) == (layer, [entering])
        assert stage["kept"][0] + stage["merged"][0] == target
        assert stage["merged"] == [int(target * 0.025)]
        assert stage["dropped"] == [entering - target]
        assert report["tokens_per_layer"][layer] == [report["n_text"][0] + target]
        assert report["tokens_per_layer"][layer - 1] == [report["n_text"][0] + entering]
        entering = target
    assert figures["config"]["vision_top_k"] == 2
    assert 0.3 < report["flops"]["saved"] < 0.6
    assert figures["prefill_seconds"]["dense"] > 0 and figures["prefill_seconds"]["fastmmoe"] > 0
    assert len(figures["answers"]["dense"]) == len(figures["answers"]["fastmmoe"]) == 2


def test_bench_tables(tmp_path, picture):
    output = tmp_path / "bench.png"
    out = succeed("bench", "--image", picture, "--output", output, "--max-new-tokens", 2, "--prompt", "Hi", "--seed", 5)
    assert "256 vision tokens" in out and "GFLOPs" in out and "merged" in out
    assert "12 to 15" in out  # the layers after the last stage
    assert "random" in out and "babble" in out
    assert "language model on cpu, floors by calculation, not measured: " in out
    assert str(output) in out and output.exists()


def test_run_on_the_saved_model_is_the_bench(tmp_path, picture, checkpoint):
    """Both commands share one path: the same weights, image, prompt and retention give the same figures."""
    outputs = [tmp_path / name for name in ("bench.png", "run.png")]
    common = ["--image", picture, "--prompt", PROMPT, "--retention", 0.4, "--max-new-tokens", 4, "--json"]
    bench = json.loads(succeed("bench", *common, "--output", outputs[0]))
    run = json.loads(
        succeed("run", "--model", checkpoint, *common, "--output", outputs[1], "--device", "cpu", "--dtype", "float32")
    )
    assert run["config"] == bench["config"]
    assert run["report"] == bench["report"]
    assert run["answers"] == bench["answers"]
    first, second = (Image.open(path) for path in outputs)
    assert first.tobytes() == second.tobytes()


def test_run_takes_images_and_settings(picture, checkpoint):
    options = ["--vision-top-k", 3, "--prune-layers", "4,9", "--alpha", 0.3, "--strategy", "routing_similarity"]
    options += ["--keep-by", "redundancy"]
    common = ["--image", picture, "--image", picture, "--prompt", "Compare.", "--max-new-tokens", 2, "--json"]
    figures = json.loads(succeed("run", "--model", checkpoint, *common, *options, "--device", "cpu"))
    config = figures["config"]
    assert (config["vision_top_k"], config["prune_layers"], config["alpha"]) == (3, [4, 9], 0.3)
    assert (config["strategy"], config["keep_by"], config["retention"]) == ("routing_similarity", "redundancy", 0.5)
    assert figures["report"]["n_vision"] == [512]
    floor, counted = figures["calculated_floor_seconds"], figures["report"]["flops"]
    # in float32 on a CPU nearly all of it is FLOPs
    assert floor["device"] == "cpu" and 0 < floor["fastmmoe"] < floor["dense"]
    assert floor["fastmmoe"] / floor["dense"] == pytest.approx(counted["reduced"] / counted["dense"], rel=0.25)
    assert [stage["layer"] for stage in figures["report"]["stages"]] == [4, 9]
    assert figures["picture"] is None


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """A DeepSeek-VL2 of 9 layers that reads tiles of 32 pixels and one token per byte."""
    directory = tmp_path_factory.mktemp("deepseek")
    tiny_deepseek_vl2("base", num_hidden_layers=9, vocab_size=272).save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(golden("processor/stub_tokenizer.json")))
    tiles = DeepseekVLV2ImageProcessor([[32, 32], [64, 32]], patch_size=6)
    DeepseekVLV2Processor(tiles, tokenizer).save_pretrained(directory)
    return directory


def test_run_on_deepseek_vl2(deepseek, tmp_path):
    wide = tmp_path / "wide.png"
    cat_photograph().resize((64, 30)).save(wide)
    options = ["--image", wide, "--prompt", "What?", "--max-new-tokens", 3, "--device", "cpu"]
    figures = json.loads(succeed("run", "--model", deepseek, *options, "--json"))
    report = figures["report"]
    assert report["n_vision"] == [3 * 4 + 1 + 3 * 7]  # a global view and two tiles of 3 x 3
    # bos, user token, ": ", line break, the question, two line breaks, assistant token, ":"
    assert report["n_text"] == [1 + 1 + 2 + 1 + 5 + 2 + 1 + 1]
    assert [stage["layer"] for stage in report["stages"]] == [2, 5, 8]
    config = figures["config"]
    assert (config["alpha"], config["merge_ratio"], config["vision_top_k"]) == (0.3, 0.05, 2)
    counted = json.loads(succeed("flops", deepseek, "--text", 14, "--vision", 34, "--json"))
    assert counted["dense"] == report["flops"]["dense"]
    # two views with row ends and a separator, all of them in the report and none of these in the picture
    output = tmp_path / "fate.png"
    drawn = json.loads(succeed("run", "--model", deepseek, *options, "--output", output, "--json"))
    assert drawn["picture"] == str(output) and output.exists()


def test_a_port_in_a_process_that_has_not_imported_it(deepseek, picture):
    """Past the config, to a prompt that is no UTF-8."""
    command = [sys.executable, "-m", "fastmmoe_cli", "run", "--model", deepseek, "--image", picture, "--device", "cpu"]
    done = subprocess.run([*command, "--prompt", b"\xff"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --prompt: expected text in UTF-8, got '\\udcff'\n"


def test_flops_of_deepseek_vl2_by_name():
    figures = json.loads(succeed("flops", "deepseek-ai/deepseek-vl2-small", "--vision-top-k", 3, "--json"))
    assert len(figures["per_layer"]) == 27 and 0.2 < figures["saved"] < 0.4


def command_of(*options):
    """(the words in front of the options, the `additional_config`'s entry, the other options) of a server's command."""
    words = shlex.split(succeed("serve", *options[:1], "--dry-run", *options[1:]))
    at = words.index("--additional-config")
    return words[:at], json.loads(words[at + 1])["fastmmoe"], words[at + 2 :]


def test_serve_prints_the_servers_command(checkpoint):
    words, values, others = command_of(checkpoint)
    assert Path(words[-1]) == checkpoint and values == {"retention": 0.5} and others == []
    options = ["--retention", 0.4, "--prune-layers", "2,4", "--vision-top-k", 1, "--keep-by", "redundancy"]
    _, values, others = command_of(checkpoint, *options, "--", "--port", 8000, "--enforce-eager")
    assert values == {"retention": 0.4, "prune_layers": [2, 4], "vision_top_k": 1, "keep_by": "redundancy"}
    assert others == ["--port", "8000", "--enforce-eager"]
    assert command_of(checkpoint, "--all-experts")[1] == {"retention": 0.5, "vision_top_k": None}


def test_serve_says_layers_that_a_shallow_model_has():
    assert command_of(CHECKPOINT)[1] == {"retention": 0.5, "prune_layers": [1, 2, 3]}
    assert invoke("serve", CHECKPOINT, "--dry-run").stderr == FITTED
    assert command_of(CHECKPOINT, "--retention", 1.0)[1] == {"retention": 1.0}


@pytest.mark.parametrize(
    "options, says",
    [
        (["--retention", 1.5], "retention: expected a number in (0, 1]"),
        (["--prune-layers", "2,400"], "the model has 16 layers"),
        (["--all-experts", "--vision-top-k", 2], "--all-experts: expected it or --vision-top-k 2"),
        (["--", "--additional-config", "{}"], "--additional-config: this command sets it"),
        (["--", "--additional-config={}"], "--additional-config: this command sets it"),
        (["--", "--additional_config", "{}"], "--additional-config: this command sets it"),
        (["--", "--additional-config.fastmmoe.retention", 0.3], "--additional-config.fastmmoe.retention: this command"),
        (["--", "--model", "another"], "--model: this command sets it"),
        (["--retention", 1.0, "--all-experts"], "--all-experts: without effect at --retention 1.0"),
        (["--retention", 1.0, "--prune-layers", "2,4"], "--prune-layers: without effect at --retention 1.0"),
    ],
)
def test_bad_settings_of_serve_are_one_line(checkpoint, options, says):
    assert says in refused("serve", checkpoint, "--dry-run", *options)


def test_serve_without_the_engine_names_the_extra(checkpoint, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    assert "pip install 'fastmmoe[vllm]'" in refused("serve", checkpoint)
    assert "no such directory" in refused("serve", "./nowhere")


def test_full_retention_draws_nothing(tmp_path, picture, checkpoint):
    output = tmp_path / "nothing.png"
    common = ["--model", checkpoint, "--image", picture, "--prompt", "Hi", "--max-new-tokens", 1, "--device", "cpu"]
    out = succeed("run", *common, "--retention", 1, "--output", output)
    assert "no picture: no layer pruned" in out
    assert not output.exists()


def test_doctor_names_this_machine():
    findings = {f["name"]: f for f in json.loads(succeed("doctor", "--json"))["findings"]}
    assert findings["torch"]["found"] == torch.__version__
    assert findings["transformers"]["found"] == importlib.metadata.version("transformers")
    assert findings["sdpa"]["found"] == "available, and what a model takes unless told otherwise"
    has_gpu = torch.cuda.is_available()
    assert findings["auto"]["found"].startswith("triton" if has_gpu else "torch")
    assert ("GPU 0" in findings) == has_gpu
    if not has_gpu:
        says = "check the driver" if torch.version.cuda or torch.version.hip else "install"
        assert not findings["GPU"]["ok"] and says in findings["GPU"]["advice"]
    assert findings["cli"]["found"] == findings["study"]["found"] == "installed"
    for name, module in (("torchvision", "torchvision"), ("PyAV", "av")):
        is_there = importlib.util.find_spec(module) is not None
        assert (findings[name]["found"] != "not installed") == is_there
        assert bool(findings[name]["advice"]) != is_there and "for video" in (findings[name]["advice"] or "for video")
    assert torch.__version__ in succeed("doctor")


def test_doctor_of_a_model(deepseek, tmp_path):
    def found(checkpoint):
        findings = json.loads(succeed("doctor", "--model", checkpoint, "--json"))["findings"]
        assert "models" not in {finding["group"] for finding in findings}
        return {f["name"]: (f["found"], f["ok"]) for f in findings if f["group"] == "model"}

    assert found(CHECKPOINT) == {
        "internvl": ("supported, as InternVL", True),
        "fewer experts": ("preset: 2 per vision token, from layer 2 on", True),
        "pruning": ("the preset's layers do not fit; at layers such as 1, 2, 3", True),
    }
    shallow = AutoConfig.from_pretrained(CHECKPOINT)
    shallow.text_config.num_hidden_layers = 2
    shallow.text_config.layer_types = None
    shallow.save_pretrained(tmp_path)
    said = found(tmp_path)
    assert said["internvl"] == ("supported, as InternVL", True)
    assert "no: reduction_layer=2" in said["fewer experts"][0] and not said["fewer experts"][1]
    assert said["pruning"][0].endswith("it has too few to prune in, expected retention=1.0") and not said["pruning"][1]
    assert found(deepseek)["pruning"] == ("preset: at layers 2, 5, 8", True)


def test_doctor_of_models_that_take_less(tmp_path):
    found = {}
    for name in ("llama4", "gemma4"):
        TINY[f"{name}+{name}_text"].model().config.save_pretrained(tmp_path / name)
        findings = json.loads(succeed("doctor", "--model", tmp_path / name, "--json"))["findings"]
        found[name] = {finding["name"]: finding for finding in findings if finding["group"] == "model"}
    assert found["llama4"]["fewer experts"]["found"] == "no: every token takes one expert already"
    assert found["gemma4"]["pruning"]["found"].startswith("no: retention=0.5: Gemma-4 cannot prune")
    assert not found["llama4"]["fewer experts"]["ok"] and not found["gemma4"]["pruning"]["ok"]


def test_run_says_where_no_time_is_saved(capsys):
    model, processor = demo_model()
    picture, questions = demo_example()
    inputs = build_inputs(model, processor, [picture], questions[0].text)
    compared = compare(model, processor, inputs, demo_config(0.5), max_new_tokens=1, runs=1)
    for fast, says in ((1.0, True), (0.9, False)):
        show("m", "q", [picture], replace(compared, dense_prefill=1.0, fast_prefill=fast), None, False)
        assert ("No time was saved in these runs" in capsys.readouterr().out) == says


@pytest.mark.parametrize("command", ["demo", "run", "bench", "serve", "flops", "time", "doctor"])
def test_help_has_an_example(command):
    assert f"Example: fastmmoe {command}" in " ".join(succeed(command, "--help").split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["flops", "gpt-2"], "unknown name 'gpt-2'"),
        (["flops", "internvl3.5-30b-a3b", "--prune-layers", "5,eight"], "--prune-layers 5,eight"),
        (["flops", "internvl3.5-30b-a3b", "--prune-layers", "48", "--retention", "0.5"], "48 layers"),
        (["flops", "internvl3.5-30b-a3b", "--retention", "0.5", "--prune-layers", ""], "the layers to prune at"),
        (["flops", "gemma-4-26b-a4b", "--retention", "0.5"], "Gemma-4 cannot prune"),
        (["flops", "gpt-2", "--retention", "0.5"], "unknown name 'gpt-2'"),
        (["flops", "qwen3-vl-235b-a22b", "--retention", "0.5"], "--prune-layers: expected the layers to prune at: no"),
        (["flops", "internvl3.5-30b-a3b", "--vision-top-k", "9"], "at most the model's 8"),
        (["demo", "--image", "no.png"], "--image no.png: No such file"),
        (["demo", "--output", "picture.jpg"], "expected a .png file"),
        (["demo", "--output", "no/such/picture.png"], "in a directory that exists"),
        (["demo", "--retention", "0"], "retention: expected a number in (0, 1], got 0.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(arguments, says):
    assert says in refused(*arguments)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prune-layers", "5,16"], "the model has 16 layers"),
        (["--prune-layers", "8,5"], "rising order"),
        (["--vision-top-k", "5"], "at most the model's 4"),
        (["--device", "tpu"], "--device tpu: no name of a device, expected one of auto, cpu"),
        (["--strategy", "best"], "hybrid"),
        (["--keep-by", "size"], "redundancy"),
        (["--device", "potato"], "potato"),
        (["--device", "cuda:99"], "--device cuda:99: this machine has"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_of_run_are_one_line(picture, checkpoint, options, says):
    device = [] if "--device" in options else ["--device", "cpu"]
    assert says in refused("run", "--model", checkpoint, "--image", picture, "--prompt", "Hi", *device, *options)


def test_the_setting_that_is_wrong_is_named_of_a_shallow_model(picture):
    options = ["--model", CHECKPOINT, "--image", picture, "--prompt", "Hi", "--vision-top-k", 99]
    assert refused("run", *options) == "error: --vision-top-k=99: expected at most the model's 4\n"


def test_run_takes_layers_that_a_shallow_model_has():
    options = ["--image", EXAMPLE / "picture.png", "--prompt", "how many digits ?", "--max-new-tokens", 1, "--json"]
    result = invoke("run", "--model", CHECKPOINT, *options, "--device", "cpu")
    assert result.stderr == FITTED and json.loads(result.stdout)["config"]["prune_layers"] == [1, 2, 3]


def test_what_is_no_image_or_no_supported_model_is_one_line(tmp_path, picture):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    common = ["--prompt", "Hi", "--device", "cpu"]
    assert "not an image" in refused("run", "--model", tmp_path, "--image", text, *common)
    assert "missing: no such directory" in refused("run", "--model", tmp_path / "missing", "--image", picture, *common)
    # a language model without eyes
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert "qwen3_moe" in refused("run", "--model", tmp_path, "--image", picture, *common).lower()


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_the_extra_the_command_names_it(module):
    code = f"import sys; sys.modules[{module!r}] = None; from fastmmoe_cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == f"fastmmoe: the command line needs {module}: pip install 'fastmmoe[cli]'"


def test_the_command_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fastmmoe_cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("demo", "run", "bench", "flops", "time", "doctor"))
