"""`--report`: a comparison as one HTML file that needs nothing else; whatever a prompt or a model says is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastmmoe.cost.prefill_time import TimeReport
    from fastmmoe_cli.compare import Comparison

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>FastMMoE: {{ title }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
  table { border-collapse: collapse } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
  td:first-child, th:first-child, .text td { text-align: left } img { max-width: 100%; margin: .3rem 0 }
  .answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
  .answers > div { background: #f4f5fb; padding: .8rem }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 0 }
  .bar { fill: #c5cae9 } .now { fill: #3f51b5 } svg text { font: 11px sans-serif }
  .note { color: #666; font-size: .9rem }
</style>
<h1>{{ title }}</h1>
<h2>The question</h2>
<pre>{{ question }}</pre>
<h2>Answers</h2>
<div class="answers">
  <div><b>FastMMoE off</b><pre>{{ result.dense_answer }}</pre></div>
  <div><b>FastMMoE on</b><pre>{{ result.fast_answer }}</pre></div>
</div>
{% if pictures %}
<h2>{{ "What was kept" if drawn else "Pictures" }}</h2>
{% for picture in pictures %}<img alt="" src="data:image/png;base64,{{ picture }}">{% endfor %}
{% endif %}
<h2>Cost of the prefill</h2>
<table>
  <tr><th>{{ n_text }} text and {{ n_vision }} vision tokens</th><th>off</th><th>on</th><th>saved</th></tr>
  {% for row in costs %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
  {% endfor %}
</table>
<p class="note">Measured times: medians of {{ result.runs }} alternating runs, vision tower included. FLOPs are the
language model's.
{% if floor %}Calculated floor on {{ floor }}: no measurement.{% endif %}</p>
{% for chart in charts %}
<h2>{{ chart.name }} by layer</h2>
<svg viewBox="0 0 {{ 60 + 14 * chart.bars|length }} 150" width="100%" style="max-height: 15rem" role="img">
  <text x="0" y="12">{{ chart.most }}</text><text x="0" y="120">0</text>
  {% for bar in chart.bars %}<g><title>layer {{ loop.index0 }}: {{ bar.shown }}</title>
  <rect class="bar" x="{{ 55 + 14 * loop.index0 }}" y="{{ 120 - bar.dense }}" width="10" height="{{ bar.dense }}"/>
  <rect class="now" x="{{ 55 + 14 * loop.index0 }}" y="{{ 120 - bar.now }}" width="10" height="{{ bar.now }}"/>
  {% if loop.index0 % 4 == 0 %}<text x="{{ 55 + 14 * loop.index0 }}" y="134">{{ loop.index0 }}</text>{% endif %}</g>
  {% endfor %}
</svg>
<p class="note">Pale: FastMMoE off. Dark: on.{{ chart.note }}</p>
{% endfor %}
{% if stages %}
<h2>Vision tokens</h2>
<table>
  <tr><th>layer</th><th>entering</th><th>kept</th><th>merged</th><th>dropped</th></tr>
  {% for row in stages %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
  {% endfor %}
</table>
<p class="note">Merged: tokens made of several, of which the others count as dropped.</p>
{% endif %}
<h2>Settings</h2>
<table class="text">
  {% for name, value in settings.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
  {% endfor %}
</table>
<p class="note">{{ method }}, FastMMoE {{ version }}.</p>
</html>
"""


def write_page(
    path: Path,
    title: str,
    question: str,
    result: Comparison,
    time: TimeReport | None,
    pictures: Sequence[bytes],
    drawn: bool,
) -> None:
    """Write the page.

    Args:
        title: what the model is called.
        time: the calculated floor, where the device's ceilings are known.
        pictures: PNG files; `drawn`: with what became of each token.

    Raises:
        OSError: it cannot be written.
    """
    import fastmmoe

    report = result.report
    flops = report.flops
    tokens = [sum(samples) for samples in report.tokens_per_layer]
    before = sum(report.n_text) + sum(report.n_vision)
    charts = [
        _chart("Tokens in the MoE", [before] * len(tokens), tokens, ""),
        _chart("FLOPs", [row.dense for row in flops.per_layer], [row.reduced for row in flops.per_layer], ""),
    ]
    costs = [("FLOPs", _si(flops.dense), _si(flops.reduced), f"{flops.saved:.1%}")]
    if result.runs:
        dense, fast = result.dense_prefill, result.fast_prefill
        costs.append(("time, measured", f"{dense * 1e3:,.0f} ms", f"{fast * 1e3:,.0f} ms", f"{1 - fast / dense:.1%}"))
    if time is not None:
        saved = f"{1 - time.reduced / time.dense:.1%}"
        costs.append(("time, calculated", f"{time.dense * 1e3:,.1f} ms", f"{time.reduced * 1e3:,.1f} ms", saved))
        dense, reduced = ([getattr(row, way) for row in time.per_layer] for way in ("dense", "reduced"))
        charts.append(_chart("Time, s", dense, reduced, " Calculated, not measured."))
    values = {name: value for name, value in result.config.to_dict().items() if value is not None}
    page = Environment(autoescape=True).from_string(PAGE)
    text = page.render(
        title=title, question=question, result=result, drawn=drawn, charts=charts, costs=costs, settings=values,
        pictures=[base64.b64encode(picture).decode() for picture in pictures],
        n_text=f"{sum(report.n_text):,}", n_vision=f"{sum(report.n_vision):,}",
        floor=time and time.ceilings.name, method=type(result.config).__name__, version=fastmmoe.__version__,
        stages=[
            (stage.layer, sum(stage.entering), sum(stage.kept), sum(stage.merged), sum(stage.dropped))
            for stage in report.stages
        ],
    )  # fmt: skip
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")


def as_png(image: Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _chart(name: str, dense: Sequence[float], now: Sequence[float], note: str) -> dict:
    """A bar per layer, at most 110 high."""
    most = max(*dense, *now)
    bars = [
        {"dense": round(110 * one / most, 1), "now": round(110 * two / most, 1), "shown": f"{_si(one)} -> {_si(two)}"}
        for one, two in zip(dense, now, strict=True)
    ]
    return {"name": name, "most": _si(most), "bars": bars, "note": note}


def _si(value: float) -> str:
    """Three digits and a letter."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.3g} {letter}"
    return f"{value:.3g}" if value < 1 else f"{value:,.0f}"
