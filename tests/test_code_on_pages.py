"""The code on the README and on the Start page runs."""

import re
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from fastmmoe.families.internvl_random import save_random_model
from fastmmoe.scenes import EXAMPLE

ROOT = Path(__file__).parents[1]
# the large model's name and machine, for what is here
HERE = {
    'name = "OpenGVLab/InternVL3_5-30B-A3B-HF"': "name = CHECKPOINT",
    "from transformers import AutoModelForImageTextToText, AutoProcessor": (
        "from transformers import AutoModelForImageTextToText\n"
        "from fastmmoe.families.processors import load_processor"
    ),
    "AutoProcessor.from_pretrained(name)": "load_processor(name)",  # no torchvision is here
    '.to("cuda")': '.to("cpu")',
    '"a.jpg"': repr(str(EXAMPLE / "picture.png")),
}


def code_of(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def run(code, **names):
    exec(compile(code, "page", "exec"), names)
    return names


def test_the_pages_show_the_same():
    assert code_of("README.md") == code_of("docs/start.md")[:1]


def test_on_a_large_model(capsys, tmp_path):
    """On one of random weights that is as deep as the preset asks for."""
    checkpoint = save_random_model(tmp_path)
    code = code_of("README.md")[0]
    for there, here in HERE.items():
        assert code.count(there) == 1
        code = code.replace(there, here)
    names = run(code, CHECKPOINT=checkpoint)
    said = capsys.readouterr().out
    assert "layer  12: " in said and "language model FLOPs" in said
    # disabled: as a model that was never enabled
    stock = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="bfloat16").eval()
    logits = [model(**names["inputs"]).logits for model in (names["model"], stock)]
    assert torch.equal(*logits)


def test_on_the_small_model(capsys):
    names = run(code_of("docs/start.md")[1])
    assert capsys.readouterr().out.endswith(f" {names['questions'][0].answer}, right: {names['questions'][0].answer}\n")
