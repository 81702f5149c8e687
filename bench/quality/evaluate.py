"""How well a model answers: exact match per type of question, and its standard error.

    python bench/quality/evaluate.py --split test --scenes 500
    python bench/quality/evaluate.py --split test --scenes 40 --generate
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, InternVLForConditionalGeneration

sys.path.append(str(Path(__file__).parents[1]))
from provenance import provenance

from fastmmoe.scenes import CHECKPOINT, TYPES, exact_match, generator, questions, scene
from quality.batches import Batch, pack
from quality.scoring import IGNORE, Record, accuracy, right_answers


def answer_logits(
    model: InternVLForConditionalGeneration, features: torch.Tensor, batch: Batch, **kwargs
) -> tuple[torch.Tensor, object]:
    """Logits [N, V] of the tokens that have a label, and the language model's output; features [B, 100, H]."""
    inner = model.model
    embeddings = inner.get_input_embeddings()(batch.ids)
    # every sequence begins with `<img>`, the picture, `</img>`
    embeddings = torch.cat((embeddings[:, :1], features, embeddings[:, 1 + features.shape[1] :]), 1)
    output = inner.language_model(
        inputs_embeds=embeddings, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False, **kwargs
    )
    return model.lm_head(output.last_hidden_state[batch.labels != IGNORE]), output


@torch.inference_mode()
def evaluate_packed(
    model: InternVLForConditionalGeneration, split: str, first: int, count: int, size: int = 16, progress: bool = False
) -> list[Record]:
    """Ask one question of every type about scenes `first` to `first + count - 1`, all about a scene in one sequence."""
    records = []
    for start in tqdm(range(first, first + count, size), "packed", disable=not progress, unit="batch"):
        numbers = range(start, min(start + size, first + count))
        scenes = [scene(split, number) for number in numbers]
        asked = [questions(one, generator(split, number, 1)) for one, number in zip(scenes, numbers, strict=True)]
        batch = pack(scenes, asked)
        logits, _ = answer_logits(model, model.model.get_image_features(batch.pixels).pooler_output, batch)
        owners = [(number, question.type) for number, some in zip(numbers, asked, strict=True) for question in some]
        right = right_answers(logits, batch).tolist()
        records += [(*owner, correct) for owner, correct in zip(owners, right, strict=True)]
    return records


def evaluate_generated(
    model: InternVLForConditionalGeneration, split: str, first: int, count: int, progress: bool = False
) -> list[Record]:
    """The same questions as `evaluate_packed`, one at a time through the processor and `generate`."""
    from PIL import Image

    from fastmmoe.scenes.tokenizer import prompt
    from quality.processor import scene_processor

    processor = scene_processor()
    records = []
    for number in tqdm(range(first, first + count), "generate", disable=not progress, unit="scene"):
        one = scene(split, number)
        image = Image.fromarray(one.pixels)
        for question in questions(one, generator(split, number, 1)):
            inputs = processor(images=image, text=prompt(question.text), return_tensors="pt")
            ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
            said = processor.decode(ids, skip_special_tokens=True)
            records.append((number, question.type, exact_match(said, question.answer)))
    return records


def summarise(records: list[Record]) -> dict[str, dict]:
    """`accuracy` of all questions, and per type."""
    groups = {"overall": records} | {name: [r for r in records if r[1] == name] for name in TYPES}
    return {name: accuracy(group) for name, group in groups.items() if group}


def main(
    checkpoint: Annotated[str | None, typer.Option(help="Directory; the package's own by default.")] = None,
    split: Annotated[Literal["dev", "test"], typer.Option(help="Held-out split.")] = "test",
    scenes: Annotated[int, typer.Option(help="Pictures, with one question of every type about each.")] = 500,
    generate: Annotated[bool, typer.Option(help="One question at a time, as a user asks.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Exact match of a checkpoint on held-out questions."""
    checkpoint = checkpoint or str(CHECKPOINT)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    start = time.perf_counter()
    evaluate = evaluate_generated if generate else evaluate_packed
    result = summarise(evaluate(model, split, 0, scenes, progress=True))
    for name, row in result.items():
        print(f"{name:14} {row['accuracy']:.3f} +- {row['standard_error']:.3f}  n {row['n']}")
    if json_path is not None:
        head = provenance(torch.device("cpu")) | {"split": split, "scenes": scenes, "generate": generate}
        head["seconds"] = round(time.perf_counter() - start, 1)
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(head | {"exact_match": result}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
