"""What the pages' training computes: packed sequences, ideal features, its losses, and that it can be interrupted."""

import json

import pytest
import torch
from pages import train as training
from pages.batches import NAMES, cell_labels, draw_questions, ideal_features, pack, patches
from pages.evaluate import answer_logits, evaluate_packed, summarise
from pages.layout import BAR, generator, page
from pages.model import VISION_TOKENS, new_model
from pages.processor import page_processor
from pages.questions import ask, types_of
from pages.render import render
from pages.schedule import STAGES, Stage, rate
from pages.train import Settings, Trainer, reading_loss
from pages.words import SIDE, VOCABULARY, token_ids
from PIL import Image
from quality.scoring import IGNORE


@pytest.fixture(scope="module")
def model():
    return new_model(0).eval()


def test_patches_are_the_processors():
    pictures = [render(page("test", number), "test", number) for number in (1, 2)]
    inputs = page_processor()(
        images=[Image.fromarray(one) for one in pictures], text=["<vision><image></vision>kind"] * 2,
        return_tensors="pt",
    )  # fmt: skip
    got, grids = patches(pictures)
    torch.testing.assert_close(got, inputs["pixel_values"], atol=1e-6, rtol=0)
    assert grids.tolist() == inputs["image_grid_thw"].tolist()
    assert (inputs["input_ids"] == VOCABULARY["<image>"]).sum(1).tolist() == [VISION_TOKENS] * 2


@torch.inference_mode()
def test_a_packed_question_sees_its_page_and_itself(model):
    """Logits of packed questions are those of the model as users call it, one question at a time."""
    numbers = (1, 2)
    pages = [page("dev", number) for number in numbers]
    asked = [
        [q for name in types_of(one.kind)[: 5 - number] if (q := ask(one, name, generator("dev", number, 1)))]
        for one, number in zip(pages, numbers, strict=True)
    ]
    batch = pack(asked, SIDE)
    seen = model.model.visual(*patches([render(one, "dev", n) for one, n in zip(pages, numbers, strict=True)]))
    features = seen.pooler_output.view(len(pages), VISION_TOKENS, -1)
    got, _ = answer_logits(model, features, seen.deepstack_features[0].view_as(features), batch)
    owner = batch.owner[batch.labels != IGNORE]
    processor, question_number = page_processor(), 0
    for one, number, some in zip(pages, numbers, asked, strict=True):
        picture = Image.fromarray(render(one, "dev", number))
        for question in some:
            prompt = f"<vision><image></vision>{question.text} {question.answer}"
            inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
            count = len(token_ids(question.answer)) + 1
            logits = model(**inputs).logits[0, -count:]
            torch.testing.assert_close(got[owner == question_number], logits, atol=1e-3, rtol=1e-3)
            question_number += 1
    assert question_number == len(batch.types)


@torch.inference_mode()
def test_packed_and_generated_answers_agree(model):
    processor = page_processor()
    records = evaluate_packed(model, "dev", 0, 2)
    assert len({number for number, *_ in records}) == 2
    one, rng = page("dev", 1), generator("dev", 1, 1)
    asked = [question for name in types_of(one.kind) if (question := ask(one, name, rng))]
    picture = Image.fromarray(render(one, "dev", 1))
    for question, (_, name, right) in zip(asked, [r for r in records if r[0] == 1], strict=True):
        inputs = processor(images=[picture], text=[f"<vision><image></vision>{question.text}"], return_tensors="pt")
        said = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        assert name == question.type and right == (processor.decode(said, skip_special_tokens=True) == question.answer)


def test_questions_are_drawn_by_weight():
    one, weights = page("train", 1), torch.zeros(len(NAMES)).numpy()
    weights[NAMES.index("cell")] = 1.0
    drawn = draw_questions(one, generator("train", 1, 1), weights, 6)
    assert {question.type for question in drawn} == {"cell"}
    assert len({question.text for question in drawn}) == len(drawn) == 6


@pytest.mark.parametrize("index", range(4))
def test_ideal_features_cell_by_cell(index):
    table = torch.randn(len(VOCABULARY), 16, generator=torch.Generator().manual_seed(0))
    one = page("train", index, 8)
    features, deep = ideal_features(cell_labels([one], 8), table, 8)
    for row in range(8):
        for column in range(8):
            text = one.cells.get((row, column))
            ids = {None: (VOCABULARY["<unk>"],), BAR: (VOCABULARY["bars"],)}.get(text) or token_ids(text)
            want = -sum((table[i].roll(number // 2) for number, i in enumerate(ids)), torch.zeros(16))
            torch.testing.assert_close(features[0, 8 * row + column], want)
            place = table[VOCABULARY[f"r{row + 1}"]] + table[VOCABULARY[f"c{column + 1}"]]
            torch.testing.assert_close(deep[0, 8 * row + column], -place)


def test_reading_loss_is_small_and_all_is_right_where_features_are_ideal():
    table = torch.randn(len(VOCABULARY), 128, generator=torch.Generator().manual_seed(0))
    pages = [page("train", index, 8) for index in range(4)]
    labels = cell_labels(pages, 8)
    features, _ = ideal_features(labels, table, 8)
    loss, right = reading_loss(features, labels, table)
    assert right == 1.0
    # one cell shows another word
    cell = (labels[0, :, 1] >= 0).nonzero()[0, 0]
    spoiled = features.clone()
    spoiled[0, cell] = -(table[VOCABULARY["mi"]] + table[VOCABULARY["##lk"]])
    worse, fewer = reading_loss(spoiled, labels, table)
    cells = int((labels[..., 0] >= 0).sum())
    assert worse > loss and fewer == pytest.approx(1 - 1 / cells)


def test_attention_starts_as_a_look_up(model):
    """In the first layer, a query on a word's embedding fits best the vision token that shows the word."""
    attention, table = model.model.language_model.layers[0].self_attn, model.get_input_embeddings().weight
    word = torch.tensor(token_ids("milk"))
    keys = attention.k_proj(torch.cat((-table[8:40], -table[word].sum(0, keepdim=True), table[word])))
    queries = attention.q_proj(table[word[1]])
    heads, size = attention.config.num_attention_heads, attention.head_dim
    for head in range(0, heads, attention.num_key_value_groups):
        kv = head // attention.num_key_value_groups
        scores = keys[:, kv * size : (kv + 1) * size] @ queries[head * size : (head + 1) * size]
        assert scores.argmax() == 32 and scores[-1] < 0  # the cell that shows it; itself least of all


def test_standard_error_by_hand():
    """Two pages of two questions, one all right and one all wrong: an error of 1/2 per page and side."""
    records = [(0, "read", True), (0, "count", True), (1, "read", False), (1, "count", False)]
    summary = summarise(records)
    assert summary["overall"] == {"accuracy": 0.5, "standard_error": round((1 + 1) ** 0.5 / 4, 4), "n": 4}
    assert summary["one"]["n"] == summary["several"]["n"] == 2 and "layout" not in summary


def test_rates():
    stage = Stage("join", 100, SIDE, 8, (0.4, 0.0))
    assert rate(stage, 0) == pytest.approx(0.4 / 30) and rate(stage, 50) == pytest.approx(0.2)
    assert rate(stage, 100) == 0 and STAGES[-1].rate[1] == 0


def test_a_resumed_training_ends_as_one_that_was_not_interrupted(one_process, tmp_path, monkeypatch):
    """Every task once; interrupted in the middle of two."""
    stages = tuple(
        Stage(task, 3, 4 if task == "read" else 8, 2, (1.0, 0.5), made_up=task == "join")
        for task in ("answer", "read", "join")
    )
    monkeypatch.setattr(training, "STAGES", stages)
    # questions about a page of 8 x 8; the last look at dev would be at whole pages
    monkeypatch.setattr(Trainer, "evaluate", lambda self, pages: {"pages": pages})
    options = {"dev_every": 100, "dev_pages": 1, "save_every": 100}
    settings = Settings(processes=1, questions=3)
    ends = []
    for name, limits in (("whole", [None]), ("parts", [2, 5, None])):
        work = tmp_path / name
        work.mkdir()
        for part, limit in enumerate(limits):
            trainer = Trainer(0, settings, work, None, resume=part > 0)
            if limit is not None:
                steps = iter([False] * (limit - 1))
                monkeypatch.setattr(trainer, "is_out_of_time", lambda steps=steps: next(steps, True))
            assert trainer.run(**options) == (limit is None)
        ends.append(trainer)
    for one, other in zip(*(trainer.model.state_dict().values() for trainer in ends), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert ends[0].progress.right == ends[1].progress.right
    assert json.loads((tmp_path / "parts" / "log.jsonl").read_text().splitlines()[0])["settings"]["questions"] == 3
