"""How well a model answers: exact match per type of question, and its standard error.

    python bench/pages/evaluate.py --checkpoint /tmp/pages/checkpoint --split test --pages 500
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, Qwen3VLMoeForConditionalGeneration

sys.path.append(str(Path(__file__).parents[1]))
from provenance import provenance, write_json
from quality.scoring import IGNORE, Record, accuracy, right_answers

from pages.batches import Batch, pack, patches
from pages.layout import generator, page
from pages.questions import GROUPS, TYPES, ask, group_of, types_of
from pages.render import render
from pages.words import SIDE


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
    """`accuracy` of all questions, by group of types, and by type."""
    groups = {"overall": records} | {name: [r for r in records if group_of(r[1]) == name] for name in GROUPS}
    groups |= {name: [r for r in records if r[1] == name] for name in TYPES}
    return {name: accuracy(group) for name, group in groups.items() if group}


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
