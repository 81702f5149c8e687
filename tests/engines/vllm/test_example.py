"""examples/serve_vllm.py, on the trained model that the package brings."""

import os
import subprocess
import sys

from fastmmoe.scenes import EXAMPLE

from .conftest import ENVIRONMENT, OPTIONS, ROOT, RUNNERS
from .trained import save_padded

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import serve_vllm
settings = {"vision_top_k": 2, "prune_layers": [2, 4], "retention": 0.5}
print("answer:", serve_vllm.main(*sys.argv[2:5], settings, **eval(sys.argv[5])))
"""


def test_the_example(tmp_path):
    directory = save_padded(tmp_path / "padded")
    options = OPTIONS | {"dtype": "float32"}
    words = [str(ROOT / "examples"), str(directory), str(EXAMPLE / "picture.png"), "digit at r3 c1 ?", repr(options)]
    environment = os.environ | ENVIRONMENT | RUNNERS["V1"]
    done = subprocess.run([sys.executable, "-c", RUN, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "answer: 1" in done.stdout
