"""`fastmmoe demo`: the package's own small model answers questions about a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fastmmoe_cli.console import console, importing, print_json, progress, refusing
from fastmmoe_cli.extras import need
from fastmmoe_cli.options import Json, Retention, check_images, check_prompt, check_retention, open_images
from fastmmoe_cli.outputs import check_output, writing
from fastmmoe_cli.tables import stage_table, token_table

EXAMPLE = "Example: fastmmoe demo --question 'how many digits ?' --retention 0.5 --output picture.png"


def demo(
    image: Annotated[Path | None, typer.Option(help="Image file.", show_default="a picture of the test split")] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option("--question", help="Repeat for several.", show_default="one of every type the model knows"),
    ] = None,
    retention: Retention = 0.5,
    output: Annotated[Path, typer.Option(help="Where to draw what became of each token.")] = Path("fastmmoe_demo.png"),
    json: Json = False,
) -> None:
    """Ask a small trained MoE-MLLM about a picture, with FastMMoE off and on: no GPU, no download."""
    need("demo", "PIL", "matplotlib")
    check_output(output)
    check_images([] if image is None else [image])
    check_retention(retention)
    for question in questions or ():
        check_prompt("--question", question)
    with importing():
        from fastmmoe.families.chat import build_inputs, check_question, placeholders_of
        from fastmmoe.families.processors import tilings
        from fastmmoe.scenes import exact_match
        from fastmmoe.scenes.demo import demo_config, demo_example, demo_model
        from fastmmoe_cli.compare import compare
        from fastmmoe_cli.picture import draw_fate
        from fastmmoe_cli.threads import one_thread

    picture, known = demo_example()
    asked = questions or [question.text for question in known]
    if image is not None:
        # of a picture of the user's, the right answers are not known
        (picture,), known = open_images([image]), []
    answers = {question.text: question.answer for question in known}
    with refusing(ValueError, TypeError):
        config = demo_config(retention)
    results = []
    with one_thread():
        model, processor = demo_model()
        placeholders = placeholders_of(model.config, processor)
        with refusing(ValueError):
            for question in asked:
                check_question("--question", question, placeholders)
        with progress("", total=2 * len(asked)) as step:
            for question in asked:
                inputs = build_inputs(model, processor, [picture], question)
                result = compare(
                    model, processor, inputs, config, max_new_tokens=8, runs=0, step=lambda _, q=question: step(q)
                )
                results.append(result)
    report = results[-1].report
    drawn = str(output) if report.stages else None
    if json:
        rows = [
            {"question": text, "right": answers.get(text), "dense": result.dense_answer, "fastmmoe": result.fast_answer}
            for text, result in zip(asked, results, strict=True)
        ]
        print_json({"config": config.to_dict(), "answers": rows, "report": report.to_dict(), "picture": drawn})
    else:
        table = Table("question", title=f"{report.n_vision[0]} vision tokens", caption="green: right")
        for name in ("right answer", "FastMMoE off", "on"):
            table.add_column(name)
        for text, result in zip(asked, results, strict=True):
            right = answers.get(text)
            shown = [
                f"[green]{escape(said)}[/]" if right is not None and exact_match(said, right) else escape(said)
                for said in (result.dense_answer, result.fast_answer)
            ]
            table.add_row(escape(text), right or "", *shown)
        console.print(table)
        console.print(token_table(report))
        if drawn:
            console.print(stage_table(report))
        console.print(f"language model FLOPs saved: {report.flops.saved:.1%}")
    if drawn:
        with writing("--output", output):
            draw_fate(output, [picture], tilings(model.config, processor, [picture], inputs), report)
        if not json:
            console.print(f"picture, for the last question: {escape(drawn)}", soft_wrap=True)
