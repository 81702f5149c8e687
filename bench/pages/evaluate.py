"""How well a model answers: exact match per type of question, and its standard error.

    python bench/pages/evaluate.py --checkpoint bench/pages/checkpoint --split test --pages 500
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, Qwen3VLMoeForConditionalGeneration

sys.path.append(str(Path(__file__).parents[1]))
from provenance import provenance, write_json

from pages.batches import IGNORE, Batch, pack, patches
from pages.layout import generator, page
from pages.questions import GROUPS, TYPES, ask, group_of, types_of
from pages.render import render
from pages.words import SIDE

Record = tuple[int, str, bool]  # number of the page, type of the question, right


def right_answers(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Whether every token of an answer is the likeliest one, bool [questions]; greedy decoding says just these then.

    `logits` [N, V] are those of the N tokens that have a label.
    """
    labelled = batch.labels != IGNORE
    wrong = logits.argmax(-1) != batch.labels[labelled]
    return torch.zeros(len(batch.types)).index_add(0, batch.owner[labelled], wrong.float()) == 0


def answer_logits(
    model: Qwen3VLMoeForConditionalGeneration, features: torch.Tensor, deep: torch.Tensor, batch: Batch, **kwargs
) -> tuple[torch.Tensor, object]:
    """Logits [N, V] of the tokens that have a label, and the language model's output.

    `features` are the pages' vision tokens, `deep` their DeepStack features; both [B, n, H].
    """
    inner = model.model
    embeddings = inner.get_input_embeddings()(batch.ids)
    # every sequence begins with `<vision>`, the page, `</vision>`
    vision = slice(1, 1 + features.shape[1])
    embeddings = torch.cat((embeddings[:, :1], features, embeddings[:, vision.stop :]), 1)
    places = torch.zeros_like(batch.ids, dtype=torch.bool)
    places[:, vision] = True
    output = inner.language_model(
        inputs_embeds=embeddings, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False,
        visual_pos_masks=places, deepstack_visual_embeds=[deep.flatten(0, 1)], **kwargs,
    )  # fmt: skip
    return model.lm_head(output.last_hidden_state[batch.labels != IGNORE]), output


@torch.inference_mode()
def evaluate_packed(
    model: Qwen3VLMoeForConditionalGeneration, split: str, first: int, count: int, size: int = 8, progress: bool = False
) -> list[Record]:
    """Ask one question of every type about pages `first` to `first + count - 1`, all about a page in one sequence."""
    records = []
    for start in tqdm(range(first, first + count, size), "packed", disable=not progress, unit="batch"):
        numbers = range(start, min(start + size, first + count))
        pages = [page(split, number) for number in numbers]
        asked = []
        for one, number in zip(pages, numbers, strict=True):
            rng = generator(split, number, 1)
            found = [ask(one, name, rng) for name in types_of(one.kind)]
            asked.append([question for question in found if question is not None])
        batch = pack(asked, SIDE)
        pictures = [render(one, split, number) for one, number in zip(pages, numbers, strict=True)]
        seen = model.model.visual(*patches(pictures))
        features = seen.pooler_output.view(len(pages), SIDE**2, -1)
        logits, _ = answer_logits(model, features, seen.deepstack_features[0].view_as(features), batch)
        owners = [(number, question.type) for number, some in zip(numbers, asked, strict=True) for question in some]
        right = right_answers(logits, batch).tolist()
        records += [(*owner, correct) for owner, correct in zip(owners, right, strict=True)]
    return records


def summarise(records: list[Record]) -> dict[str, dict]:
    """Exact match, standard error and number of questions: overall, by group of types, by type.

    Questions about one page go wrong together, so pages, not questions, are the independent draws of the error.
    """
    groups = {"overall": records} | {name: [r for r in records if group_of(r[1]) == name] for name in GROUPS}
    groups |= {name: [r for r in records if r[1] == name] for name in TYPES}
    return {name: _accuracy(group) for name, group in groups.items() if group}


def _accuracy(records: list[Record]) -> dict:
    mean = sum(right for *_, right in records) / len(records)
    residual = defaultdict(float)
    for number, _, right in records:
        residual[number] += right - mean
    error = sum(value**2 for value in residual.values()) ** 0.5 / len(records)
    return {"accuracy": round(mean, 4), "standard_error": round(error, 4), "n": len(records)}


def main(
    checkpoint: Annotated[Path, typer.Option(help="Directory of the model.")],
    split: Annotated[Literal["dev", "test"], typer.Option(help="Held-out split.")] = "test",
    pages: Annotated[int, typer.Option(help="With one question of every type about each.")] = 500,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Exact match of a checkpoint on held-out questions."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    result = summarise(evaluate_packed(model, split, 0, pages, progress=True))
    for name, row in result.items():
        print(f"{name:14} {row['accuracy']:.3f} +- {row['standard_error']:.3f}  n {row['n']}")
    head = provenance(torch.device("cpu")) | {"split": split, "pages": pages}
    write_json(head | {"exact_match": result}, json_path)


if __name__ == "__main__":
    typer.run(main)
