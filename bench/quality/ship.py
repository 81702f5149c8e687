"""Put a finished training into the package: test it once, write the checkpoint, its card and a picture to try it on.

    python bench/quality/ship.py --work /tmp/quality
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from transformers import AutoModelForImageTextToText

sys.path.append(str(Path(__file__).parents[1]))
from provenance import provenance

from fastmmoe.scenes import CHECKPOINT, EXAMPLE, generator, questions, scene
from fastmmoe.scenes.pictures import DIGIT_SAMPLES, PHOTOGRAPHS
from fastmmoe.scenes.questions import TYPES
from quality.evaluate import evaluate_generated, evaluate_packed, summarise

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "quality"
EXAMPLE_SCENE = 0  # of the test split

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# A small MoE-MLLM that answers questions about scenes

InternVL's architecture (`InternVLForConditionalGeneration`, language model Qwen3-MoE) in small, trained from scratch:
{parameters:.2f} M parameters, 8 layers of 16 experts, top-4, 100 vision tokens per picture, {words} words. An answer
takes {active:.2f} M of the parameters, those of the vision tower and of four experts per layer included. The model
exists to measure what a change of the prefill does to answers, on a machine without a GPU and without a download. It
can do nothing else.

```python
from transformers import AutoModelForImageTextToText
from fastmmoe.families.processors import load_processor  # with torchvision, transformers.AutoProcessor does as well
from fastmmoe.scenes import CHECKPOINT, EXAMPLE
from PIL import Image

model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="float32")
processor = load_processor(CHECKPOINT)
picture = Image.open(EXAMPLE / "picture.png")
inputs = processor(images=picture, text="<IMG_CONTEXT>digit at r3 c1?", return_tensors="pt")
ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(ids, skip_special_tokens=True))
```

## Data

Pictures of 100 x 100 pixels in 5 x 5 cells, drawn by `fastmmoe.scenes`: 3 to 7 handwritten digits (scikit-learn's
`load_digits`, UCI) and 0 to 3 shapes in six colours, over dimmed photographs that come inside scikit-image's wheel.
Neither a digit scan nor a photograph is in two splits:

| split | digit scans | photographs |
| --- | --- | --- |
{splits}

Dev was watched during the training. Questions are in a fixed wording, answers a few words; r1 is the top row and c1 the
left column.

## Training

{commands}

{minutes} minutes on two processes of one thread each ({machine}; the machine was shared), seed {seed}. Phase 1
({vision_steps} steps of {vision_batch} pictures) trains vision tower and projector to name what a vision token shows,
with a head that is thrown away; phase 2 ({steps} steps of {half} and then {batch} pictures, {questions} questions each)
the language model with Muon, the rest with AdamW; load-balancing weight {balance}. The first pictures have few digits,
and the vision tower rests for the first half of phase 2. The weights are those of the last step, stored in fp16; a
training that is stopped and resumed gives the same ones. Log: `bench/results/quality/training.json`.{note}

## Exact match on test

{scenes} pictures, one question of every type about each where there is something to ask. Standard errors count
pictures, not questions, as independent; all pictures share the split's scans and photographs.

| type | example | exact match | standard error | n |
| --- | --- | --- | --- | --- |
{rows}

One question at a time through the processor and `generate`, {generated_scenes} of these pictures: {generated:.4f} (n
{generated_n}); the packed evaluation says {packed:.4f} on the same questions, {disagreements} of them judged otherwise.

## Limits

A glyph mostly falls on one vision token, and many questions are answered by a few of the 100: how much pruning costs
here says something about the order of methods, little about what it costs a model of 30 billion parameters. What other
training seeds change stands in `bench/results/quality/seeds.json`. Words outside the vocabulary are `<unk>`; pictures
other than these scenes get meaningless answers.
"""


def example_questions() -> dict[str, str]:
    """A question of every type, of the wording that the model knows."""
    asked = {}
    for number in range(100):
        for question in questions(scene("test", number), generator("test", number, 1)):
            asked.setdefault(question.type, question.text)
    return {name: asked[name] for name in TYPES}


def training_commands(log: list[dict]) -> str:
    """The command of the training, and one for every time it was extended; interruptions change nothing."""
    options = ("seed", "processes", "vision_steps", "steps", "balance")
    commands = dict.fromkeys(
        " ".join(f"--{name.replace('_', '-')} {entry['settings'][name]}" for name in options)
        for entry in log
        if "settings" in entry
    )
    return "\n".join(
        f"    python bench/quality/train.py --work DIRECTORY {command}{' --resume' if number else ''}"
        for number, command in enumerate(commands)
    )


def parameter_counts(model) -> tuple[int, int]:
    """Parameters, and those that take part in one token's way through the model."""
    total = sum(parameter.numel() for parameter in model.parameters())
    text = model.config.text_config
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return total, total - experts + experts * text.num_experts_per_tok // text.num_experts


def main(
    work: Annotated[Path, typer.Option(help="Directory of a finished training.")],
    scenes: Annotated[int, typer.Option(help="Test pictures.")] = 500,
    generated_scenes: Annotated[int, typer.Option(help="Of these, asked through `generate` as well.")] = 40,
    note: Annotated[str, typer.Option(help="A remark on this training for the card.")] = "",
) -> None:
    """Test a checkpoint and write everything that ships with it."""
    CHECKPOINT.mkdir(exist_ok=True)
    for file in (work / "checkpoint").iterdir():
        shutil.copyfile(file, CHECKPOINT / file.name)
    RESULTS.mkdir(parents=True, exist_ok=True)
    training = json.loads((work / "training.json").read_text())
    (RESULTS / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    settings = [entry for entry in training["log"] if "settings" in entry][-1]["settings"]

    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    packed = evaluate_packed(model, "test", 0, scenes, progress=True)
    generated = evaluate_generated(model, "test", 0, generated_scenes, progress=True)
    same = packed[: len(generated)]
    disagreements = sum(one != other for one, other in zip(generated, same, strict=True))
    test = summarise(packed)
    result = provenance(torch.device("cpu")) | {
        "split": "test",
        "scenes": scenes,
        "exact_match": test,
        "generated": summarise(generated),
        "packed_on_the_generated": summarise(same),
        "judged_otherwise": disagreements,
    }
    (RESULTS / "test.json").write_text(json.dumps(result, indent=1) + "\n")

    one = scene("test", EXAMPLE_SCENE)
    EXAMPLE.mkdir(exist_ok=True)
    Image.fromarray(one.pixels).save(EXAMPLE / "picture.png")
    asked = [vars(question) for question in questions(one, generator("test", EXAMPLE_SCENE, 1))]
    (EXAMPLE / "questions.json").write_text(json.dumps(asked, indent=1) + "\n")

    total, active = parameter_counts(model)
    examples = {"overall": ""} | example_questions()
    card = CARD.format(
        parameters=total / 1e6,
        active=active / 1e6,
        words=model.config.text_config.vocab_size,
        splits="\n".join(
            f"| {split} | {high - low} | {', '.join(Path(name).stem for name in PHOTOGRAPHS[split])} |"
            for split, (low, high) in DIGIT_SAMPLES.items()
        ),
        commands=training_commands(training["log"]),
        minutes=round(training["seconds"] / 60),
        machine=training["machine"]["cpu"],
        half=settings["batch"] // 2,
        note=f"\n\n{note}" if note else "",
        scenes=scenes,
        rows="\n".join(
            f"| {name} | {examples[name]} | {row['accuracy']:.3f} | {row['standard_error']:.3f} | {row['n']} |"
            for name, row in test.items()
        ),
        generated_scenes=generated_scenes,
        generated=sum(right for *_, right in generated) / len(generated),
        generated_n=len(generated),
        packed=sum(right for *_, right in same) / len(same),
        disagreements=disagreements,
        **{name: settings[name] for name in ("seed", "steps", "vision_steps", "vision_batch", "batch", "questions")},
        balance=settings["balance"],
    )
    (CHECKPOINT / "README.md").write_text(card)
    print(f"exact match {test['overall']['accuracy']:.4f} +- {test['overall']['standard_error']:.4f}")


if __name__ == "__main__":
    typer.run(main)
