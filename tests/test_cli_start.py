"""The command line answers at once: help and what can be refused early import neither torch nor transformers."""

import json
import os
import subprocess
import sys
from typing import get_args

import pytest

HEAVY = ("torch", "transformers", "fastmmoe", "numpy", "matplotlib", "PIL")
COMMANDS = ("demo", "bench", "run", "serve", "flops", "time", "analyze", "calibrate", "eval", "doctor")
RUN = f"""
import sys
from fastmmoe_cli import main
sys.argv = ["fastmmoe", *sys.argv[1:]]
try:
    main()
except SystemExit as error:
    code = error.code
print("imported:", [name for name in {HEAVY} if name in sys.modules], code)
"""


def start(*words: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)], ids=["fastmmoe", *COMMANDS])
def test_help(words):
    said, _ = start(*words, "--help")
    assert "Usage: fastmmoe" in said and said.endswith("imported: [] 0\n")


NO_SHARE = "--retention: expected a number in (0, 1], got"
ASK = ("run", "--model", "a/b", "--prompt", "What?")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nosuch",), "No such command 'nosuch'"),
        (("run",), "Missing option '--model'"),
        (("flops",), "Missing argument 'MODEL'"),
        ((*ASK, "--retention", "half"), "Invalid value for '--retention'"),
        (ASK, "--image: expected at least one, or a --video"),
        ((*ASK, "--image", "none.jpg"), "--image none.jpg: No such file or directory"),
        ((*ASK, "--image", "pyproject.toml", "--config", "none.json"), "--config none.json: No such file"),
        ((*ASK, "--image", "pyproject.toml", "--output", "a.txt"), "--output a.txt: expected a .png file"),
        (("bench", "--image", "none.jpg"), "--image none.jpg: No such file or directory"),
        (("bench", "--retention", "0.5", "--config", "a.json"), "--config a.json: says all settings"),
        (("flops", "x", "--prune-layers", "five"), "--prune-layers five: expected layer numbers"),
        (("eval", "--out", "x", "--tasks", "t", "--data", "d"), "--data: lmms-eval has no such option"),
        (("calibrate", "--out", "x", "--target", "1.5"), "--target 1.5: expected a share"),
        (("serve", "/no/such", "--retention", "0.5"), "/no/such: no such directory"),
        ((*ASK, "--image", "pyproject.toml", "--retention", "1.5"), f"{NO_SHARE} 1.5"),
        ((*ASK[:3], "--prompt", " ", "--image", "pyproject.toml"), "--prompt: expected a question, got ' '"),
        ((*ASK, "--strategy", "best"), "'best' is not one of 'hybrid', 'routing_similarity', 'dynamic_attention'"),
        ((*ASK, "--keep-by", "size"), "'size' is not one of 'importance', 'redundancy'"),
        (("bench", "--retention", "0"), f"{NO_SHARE} 0.0"),
        ((*ASK, "--image", "setup.py", "--retention", "1", "--keep-by", "redundancy"), "--keep-by: without effect at"),
        ((*ASK, "--image", "tests"), "--image tests: Is a directory"),
        ((*ASK, "--image", "pyproject.toml", "--config", "setup.py"), "--config setup.py: holds no config"),
        (("flops", "nodir/"), "nodir/: no such directory"),
        (("flops", "x", "--prune-layers", "5"), "--prune-layers: without effect at --retention 1.0"),
        (("time", "x", "--device", "b200"), "--device b200: expected one of h100, h200, a100, l40s, mi300x, cpu or a"),
        (("time", "x", "--device", "none.json"), "--device none.json: No such file"),
        (("analyze", "--out", "x", "--parts", "methds"), "--parts: unknown methds, expected some of methods, heatmap,"),
        (("analyze", "--out", "x", "--data", "none.jsonl"), "--data none.jsonl: cannot be read: No such file"),
        (("analyze", "--out", "pyproject.toml"), "--out pyproject.toml: cannot be written: pyproject.toml: Not a dir"),
        (("analyze", "--out", "x", "--resume", "--overwrite"), "--overwrite: expected it or --resume, got both"),
        (("eval", "--out", "x", "--table", "retention", "--retention", "0.3"), "--table: says what is run"),
        (("eval", "--out", "x"), "--tasks: expected the names of some of lmms-eval's"),
        (("eval", "--out", "x", "--tasks", "t", "--retention", "0"), f"{NO_SHARE} 0.0"),
        (("bench", "--prompt", ""), "--prompt: expected a question, got ''"),
        (("demo", "--retention", "nan"), f"{NO_SHARE} nan"),
        (("demo", "--question", ""), "--question: expected a question, got ''"),
        (("demo", "--image", "none.png"), "--image none.png: No such file"),
        (("serve", "a/b", "--retention", "-1"), f"{NO_SHARE} -1.0"),
        (("serve", "a/b"), "this needs vllm: pip install 'fastmmoe[vllm]'"),
        (("flops", "x", "--retention", "2"), f"{NO_SHARE} 2.0"),
    ],
)
def test_what_is_refused_early(words, message):
    said, error = start(*words)
    assert message in error.replace("\n", " ")
    assert said.endswith("imported: [] 2\n")


def test_a_torchvision_of_another_build_is_named(tmp_path):
    """The way it breaks: by an operator that its own library does not bring."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    info = tmp_path / "torchvision-0.28.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for command in ("doctor", "demo"):
        done = subprocess.run(
            [sys.executable, "-m", "fastmmoe_cli", command], capture_output=True, text=True, env=environment,
            cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 1 and done.stdout == ""
        said = "error: torchvision does not fit torch: install both from one index, or uninstall torchvision ("
        assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


def test_version():
    from fastmmoe import __version__

    assert start("--version")[0] == f"{__version__}\nimported: [] 0\n"


def test_completion():
    """What bash asks for behind `fastmmoe fl`, `fastmmoe run --kee` and `fastmmoe run --keep-by r`."""
    for typed, number, completed in (
        ("fastmmoe fl", 1, "flops"),
        ("fastmmoe run --kee", 2, "--keep-by"),
        ("fastmmoe run --keep-by r", 3, "redundancy"),
        ("fastmmoe time x --device h1", 4, "h100"),
        ("fastmmoe run --device c", 3, "cpu"),
    ):
        asked = {"_FASTMMOE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(number)}
        done = subprocess.run(
            [sys.executable, "-c", RUN], env=os.environ | asked, capture_output=True, text=True
        )  # fmt: skip
        assert done.stdout.splitlines()[0] == completed


def test_the_lists_in_help_are_those_of_the_registries():
    from fastmmoe.cost.devices import CPU, DEVICES
    from fastmmoe.families.videos import FRAMES_PER_SECOND
    from fastmmoe.methods.fastmmoe import KEEP_BY, STRATEGIES
    from fastmmoe.study import study
    from fastmmoe_cli import analyze, time
    from fastmmoe_cli.options import VIDEOS, KeepBy, Strategy

    assert analyze.PARTS == tuple(study.PARTS)
    assert time.DEVICES == (*DEVICES, CPU)
    for option, known in ((Strategy, STRATEGIES), (KeepBy, KEEP_BY)):
        literal, _ = get_args(get_args(option)[0])
        assert get_args(literal) == known
    assert time.DEVICE.startswith(f"{', '.join(DEVICES)}, {CPU} (")
    assert f"a directory of {FRAMES_PER_SECOND} frames a second" in VIDEOS.help


def test_settings_from_a_file(tmp_path):
    """`bench` by what `to_dict` gave, and by what a file of another method holds."""
    from typer.testing import CliRunner

    from fastmmoe import FastMMoEConfig, UniformConfig
    from fastmmoe.methods.files import content_of
    from fastmmoe_cli.app import app

    configs = {
        "ours": (FastMMoEConfig(vision_top_k=3, prune_layers=(2, 5), retention=0.4), lambda config: config.to_dict()),
        "uniform": (UniformConfig(prune_layers=(1,), retention=0.3), content_of),
    }
    for name, (config, write) in configs.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(write(config)))
        words = ("bench", "--config", str(path), "--max-new-tokens", "1", "--json")
        done = subprocess.run([sys.executable, "-m", "fastmmoe_cli", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["config"] == json.loads(json.dumps(config.to_dict()))
    path = tmp_path / "broken.json"
    broken = {
        '{"retention": 2}': "",
        "[1]": "expected an object with settings, got a list",
        '{"type": "Own", "config": {}}': "type: expected one of FastMMoEConfig, ",
        '{"type": ["Own"], "config": {}}': "type: expected one of FastMMoEConfig, ",
        '{"type": "FastVConfig"}': "'config' is missing",
        '{"type": "FastVConfig", "config": [1]}': "expected a dict of settings, got [1] (list)",
    }
    for content, says in broken.items():
        path.write_text(content)
        done = CliRunner().invoke(app, ["bench", "--config", str(path)])
        assert done.exit_code == 2 and "holds no config" in done.stderr.replace("\n", " ")
        assert says in done.stderr
