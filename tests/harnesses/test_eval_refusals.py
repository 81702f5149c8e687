"""`fastmmoe eval`: what does not fit is one line, in front of any question."""

import importlib.util
import os
import sys

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fastmmoe_cli.app import app

BY_TASKS = ("--tasks", "x")
BY_DATA = ("--harness", "vlmevalkit", "--data", "x")


def invoke(*words: str, out) -> Result:
    return CliRunner().invoke(app, ["eval", "--out", str(out), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*BY_TASKS, "--data", "y"), "--data: lmms-eval has no such option"),
        ((*BY_TASKS, "--judge", "y"), "--judge: lmms-eval has no such option"),
        ((*BY_TASKS, "--python", "y"), "--python: lmms-eval has no such option"),
        ((*BY_DATA, "--tasks", "y"), "--tasks: vlmevalkit has no such option"),
        ((*BY_DATA, "--batch", "2"), "--batch: vlmevalkit has no such option"),
        ((*BY_DATA, "--include-path", "."), "--include-path: vlmevalkit has no such option"),
        (("--harness", "vlmevalkit"), "--data: expected the names of some of vlmevalkit's"),
        ((*BY_DATA, "--vision-top-k", "2"), "--vision-top-k: without effect on the dense model"),
        ((*BY_DATA, "--python", "/no/python"), "--python /no/python: No such file or directory"),
        ((*BY_DATA, "--retention", "0.5", "1.5"), "--retention: expected a number in (0, 1], got 1.5"),
        ((*BY_DATA, "--resume", "--overwrite"), "--overwrite: expected it or --resume, got both"),
    ],
)
def test_a_bad_option_is_one_line(words, message, tmp_path):
    result = invoke(*words, out=tmp_path / "out")
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("vlmeval") is not None, reason="VLMEvalKit is there")
def test_an_environment_without_vlmevalkit_is_named(tmp_path, monkeypatch):
    (tmp_path / "vlmeval.py").write_text("raise AssertionError('imported into this process')")
    monkeypatch.syspath_prepend(tmp_path)
    result = invoke(*BY_DATA, "--python", sys.executable, out=tmp_path / "out")
    said = result.output.replace("\n", " ")
    assert result.exit_code == 2 and "has no fastmmoe with VLMEvalKit" in said and "make vlmevalkit" in said
    assert "the preset's" not in said
    result = invoke(*BY_DATA, "--python", sys.executable, "--retention", "1", "0.75", "0.5", out=tmp_path / "out")
    said = result.output.replace("\n", " ")
    assert said.count("the preset's prune layers do not fit a model of 8 layers") == 1 and "in (0, 1]" not in said
    assert "has no fastmmoe with VLMEvalKit" in said
    assert "vlmeval" not in sys.modules and "imported into this process" not in said and not (tmp_path / "out").exists()


def test_the_official_variables_are_read_in_front(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("MERGE_", "KEEP_", "TOKEN_MERGE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("KEEP_TOKEN_RATIO", "2")
    result = invoke(*BY_DATA, out=tmp_path / "out")
    assert result.exit_code == 2 and "environment variable KEEP_TOKEN_RATIO='2'" in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()
