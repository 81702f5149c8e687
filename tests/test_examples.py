"""The examples run as they are, and say what they promise; those that need other environments are tested there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SAID = {
    "generate": r"right: 5 6 +stock: 5 6 +reduced: 5 6\n(?s:.*)FLOPs saved: 43\.9%",
    "batch": r"vision tokens: \(16, 32, 0\)\n(?s:.*)layer 3: \(11, 22, 0\) (?s:.*)against packed: \d\.\de-0[67] apart",
    "compare_methods": r"stock +10 of 11 right(?s:.*)FastV +\d of 11(?s:.*)random",
    "own_method": r"digit at r3 c1 \? -> (?s:.*)\n\.{35}#{30}\.{35}\n",
    "own_family": r"tokens per layer: \[21, 21, 16, 16, 12, 12\]",
    "kernels_alone": r"tokens: 48 -> 32",
}
ELSEWHERE = {
    "serve_vllm": "tests/engines/vllm/test_example.py",
    "harness": "tests/harnesses/lmms_eval/test_plugin.py",
}


def test_all_are_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAID, *ELSEWHERE}
    for name, place in ELSEWHERE.items():
        assert f"examples/{name}.py" in (EXAMPLES.parent / place).read_text()


@pytest.mark.parametrize("name", SAID)
def test_example(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(SAID[name], done.stdout), done.stdout
