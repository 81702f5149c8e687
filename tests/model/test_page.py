"""`--report`: a page that needs nothing else, and on which nobody's words are markup."""

from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe_cli.app import app
from fastmmoe_cli.compare import Comparison
from fastmmoe_cli.page import write_page

from . import tiny_families

HOSTILE = "</pre><script>alert(1)</script><img src=http://x.y/z onerror=alert(2)> & \"quotes\" {{ 7 * 7 }} \ud800"


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.words.append(data)


def read(path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


@pytest.mark.parametrize("runs", [0, 3])
def test_words_are_no_markup(tmp_path, runs):
    model, inputs = tiny_families.internvl_qwen3_moe()
    config = FastMMoEConfig(vision_top_k=2, reduction_layer=1, prune_layers=(1, 3), retention=0.5)
    with fastmmoe.enabled(model, config), torch.no_grad():
        model(**inputs)
        report = fastmmoe.report(model)
    times = (1.5, 0.75) if runs else (None, None)
    result = Comparison(config, report, *times, runs, HOSTILE, HOSTILE)
    path = tmp_path / "page.html"
    write_page(path, HOSTILE, HOSTILE, result, report.time("h100"), [b"png"], drawn=False)
    page = read(path)
    assert not {"script", "iframe", "link", "object"} & set(page.tags)
    assert page.links == ["data:image/png;base64,cG5n"]
    said = "".join(page.words)
    assert said.count("<script>alert(1)</script>") == 5 and "{{ 7 * 7 }}" in said  # title twice, question, answers
    assert ("1,500 ms" in said) == bool(runs)
    assert f"{report.flops.saved:.1%}" in said and "calculated" in said
    # tokens, FLOPs, time: two bars for each of the five layers
    assert page.tags.count("rect") == 3 * 2 * 5
    for stage in report.stages:
        assert str(stage.entering[0]) in said


def test_where_it_goes_is_tried_first(tmp_path):
    result = CliRunner().invoke(app, ["bench", "--report", str(tmp_path / "none" / "page.html")])
    assert result.exit_code == 2 and "expected a .html file" in result.output.replace("\n", " ")
    result = CliRunner().invoke(app, ["bench", "--report", str(tmp_path / "page.txt")])
    assert result.exit_code == 2 and "expected a .html file" in result.output.replace("\n", " ")


def test_bench_writes_one(tmp_path):
    path = tmp_path / "page.html"
    words = ["bench", "--report", str(path), "--max-new-tokens", "1", "--prompt", "<b>What?</b>", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and f'"page": "{path}"' in result.output
    page = read(path)
    assert "b" not in page.tags[page.tags.index("h2") : page.tags.index("h2") + 2]
    assert "<b>What?</b>" in "".join(page.words)
    (picture,) = page.links
    assert picture.startswith("data:image/png;base64,") and len(picture) > 100_000
