"""The trained model that the package brings, for vLLM on a CPU: its attention there has no heads of 24, but of 32.

    python -m tests.engines.vllm.trained SPEC RESULT    # answers of an engine in a process of its own

`save_padded` writes an exactly equivalent checkpoint. Every head of q, k, v and of what the output projection reads
gets 8 zeros. Position embeddings turn the first 24 numbers alone. The norm of a head's q or k means over 32 numbers,
of which 24 count: its weight takes sqrt(24 / 32). Scores are divided by sqrt(32) in place of sqrt(24): the q norm's
weight takes sqrt(32 / 24) more, which leaves it as it was.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from fastmmoe.scenes import CHECKPOINT, EXAMPLE
from fastmmoe.scenes.pictures import CELLS, COLOURS

HEAD = 32


def save_padded(directory: Path) -> Path:
    """Write it; float32, for half precision would round the weights of the norms."""
    shutil.copytree(CHECKPOINT, directory, dirs_exist_ok=True)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    text, head = config["text_config"], config["text_config"]["head_dim"]
    config["dtype"], text["head_dim"] = "float32", HEAD
    text["rope_parameters"]["partial_rotary_factor"] = head / HEAD
    file.write_text(json.dumps(config, indent=2))

    def padded(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and "language_model" in name:
            heads = weight.unflatten(0, (-1, head))  # [heads, 24, H]
            return torch.nn.functional.pad(heads, (0, 0, 0, HEAD - head)).flatten(0, 1)
        if name.endswith("self_attn.o_proj.weight"):
            heads = weight.unflatten(1, (-1, head))  # [H, heads, 24]
            return torch.nn.functional.pad(heads, (0, HEAD - head)).flatten(1)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            scale = 1.0 if name.endswith("q_norm.weight") else (head / HEAD) ** 0.5
            return torch.nn.functional.pad(weight * scale, (0, HEAD - head))
        return weight

    weights = load_file(CHECKPOINT / "model.safetensors")
    made = {name: padded(name, weight.float()).contiguous() for name, weight in weights.items()}
    save_file(made, directory / "model.safetensors", {"format": "pt"})
    return directory


def pictures() -> list[Image.Image]:
    """The example, and the same seen in a mirror."""
    picture = Image.open(EXAMPLE / "picture.png").convert("RGB")
    return [picture, ImageOps.mirror(picture)]


def asked() -> list[tuple[int, str]]:
    """(picture, question): those that come with the example, and others in the model's words."""
    cells = [f"r{row} c{column}" for row in range(1, CELLS + 1) for column in range(1, CELLS + 1)]
    questions = [question["text"] for question in json.loads((EXAMPLE / "questions.json").read_text())]
    questions += [f"{what} at {cell} ?" for cell in cells[::3] for what in ("digit", "colour")]
    questions += [f"digits in r{row} ?" for row in range(1, CELLS + 1)]
    questions += [f"how many are {colour} ?" for colour in COLOURS]
    questions += [f"is there a {digit} ?" for digit in range(10)]
    return [(number, question) for number in range(len(pictures())) for question in dict.fromkeys(questions)]


def main() -> None:
    spec, result = (Path(argument) for argument in sys.argv[1:3])
    result.write_text(json.dumps(run(**json.loads(spec.read_text()))))


def run(directory: str, prompts: list[str], new_tokens: int, **options: object) -> list[list[int]]:
    """Ids that vLLM generates, all questions at once."""
    from vllm import LLM, SamplingParams

    llm = LLM(directory, dtype="float32", seed=0, enforce_eager=True, **options)
    images = pictures()
    requests = [
        {"prompt": prompt, "multi_modal_data": {"image": images[number]}}
        for prompt, (number, _) in zip(prompts, asked(), strict=True)
    ]
    outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=new_tokens), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    main()
