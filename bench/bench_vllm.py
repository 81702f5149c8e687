"""vLLM's own server, stock and with FastMMoE: time to the first token, time per token after it, requests per second.

    python bench/bench_vllm.py --json vllm.json
    python bench/bench_vllm.py --checkpoint MODEL --image-size 896x896 --requests 64 -- --dtype bfloat16

Both servers are up at once and only one is loaded at a time; they take turns, round after round, in changing order.
The client is vLLM's (`vllm bench serve`, random text and noise for images, the same for both in a round, new in every
round, so that no cache of pictures or prefixes helps). What counts are the ratios within each round. Options behind
`--` go to both servers. Without --checkpoint it is a small random InternVL, made on the spot.
"""

import contextlib
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from provenance import provenance, write_json
from rich.console import Console
from rich.table import Table

STOCK, OURS = "stock", "fastmmoe"
# of vLLM's client: figure -> whether less of it is better
FIGURES = {"median_ttft_ms": True, "median_tpot_ms": True, "request_throughput": False, "output_throughput": False}
START_SECONDS = 900


def read_size(text: str) -> tuple[int, int]:
    """'896x448' -> (896, 448), width and height in pixels.

    Raises:
        ValueError: not of this form.
    """
    width, cross, height = text.partition("x")
    if not (cross and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"--image-size: expected WIDTHxHEIGHT in pixels, got {text!r}")
    return int(width), int(height)


def gains(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """How many times better ours is than stock, by figure: median, least and most of the rounds' ratios; > 1: better.

    Args:
        rounds: by server, the figures of its turn.
    """
    found = {}
    for figure, less_is_better in FIGURES.items():
        worse, better = (STOCK, OURS) if less_is_better else (OURS, STOCK)
        ratios = [turn[worse][figure] / turn[better][figure] for turn in rounds]
        found[figure] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return found


def save_model(directory: Path) -> Path:
    """The small random InternVL, with what vLLM asks for beside images."""
    from fastmmoe.families.internvl_random import TILE, save_random_model

    save_random_model(directory)
    video = {"video_processor_type": "InternVLVideoProcessor", "size": {"height": TILE, "width": TILE}}
    (directory / "video_preprocessor_config.json").write_text(json.dumps(video))
    return directory


def client_options(
    url: str, model: str, seed: int, images: int, size: tuple[int, int], text: int, new: int, requests: int,
    concurrency: int,
) -> list[str]:  # fmt: skip
    """Of `vllm bench serve`."""
    options = {
        "backend": "openai-chat", "endpoint": "/v1/chat/completions", "base-url": url, "model": model, "seed": seed,
        "dataset-name": "random-mm", "random-input-len": text, "random-output-len": new,
        "random-mm-base-items-per-request": images, "random-mm-num-mm-items-range-ratio": 0,
        "random-mm-limit-mm-per-prompt": json.dumps({"image": images, "video": 0}),
        "random-mm-bucket-config": f"{{({size[1]}, {size[0]}, 1): 1.0}}",
        "num-prompts": requests, "max-concurrency": concurrency, "temperature": 0, "percentile-metrics": "ttft,tpot",
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + [
        "--ignore-eos", "--disable-tqdm"
    ]  # fmt: skip


def run_client(options: Sequence[str]) -> dict[str, float]:
    """The figures of one turn.

    Raises:
        RuntimeError: a request that was not answered.
    """
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = serve.main(parser.parse_args(list(options)))
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} requests failed: {next(filter(None, result['errors']))}")
    return {figure: result[figure] for figure in FIGURES} | {
        "completed": result["completed"],
        "input_tokens": result["total_input_tokens"],
        "output_tokens": result["total_output_tokens"],
    }


def server_command(model: str, reduction: Mapping[str, object] | None, port: int, options: Sequence[str]) -> list[str]:
    """A server's; stock without a reduction."""
    asked = ["--additional-config", json.dumps({"fastmmoe": reduction})] if reduction is not None else []
    # the module: builds for CPUs have no command that starts
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port),
            "--host", "127.0.0.1", "--gpu-memory-utilization", "0.4", *asked, *options]  # fmt: skip


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """A server's address, while it is up."""
    with log.open("wb") as file:
        # a session of its own, so that all its processes can be ended
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while not answers(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def print_report(result: dict) -> None:
    table = Table(title=f"{result['model']}: {result['images']} x {result['image_size']}, {result['rounds']} rounds")
    for column in ("", STOCK, OURS, "times better", "of the rounds"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for figure, gain in result["gains"].items():
        medians = [statistics.median(turn[name][figure] for turn in result["turns"]) for name in (STOCK, OURS)]
        table.add_row(figure, *(f"{value:.4g}" for value in medians), f"{gain['median']:.2f}",
                      f"{gain['least']:.2f} to {gain['most']:.2f}")  # fmt: skip
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def main(
    others: Annotated[list[str] | None, typer.Argument(metavar="-- VLLM OPTIONS", help="To both servers.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Directory or hub id.", show_default="a small one")] = None,
    retention: Annotated[float, typer.Option(help="Share of vision tokens kept on average.")] = 0.5,
    images: Annotated[int, typer.Option(min=1, help="Images of each request.")] = 1,
    image_size: Annotated[str, typer.Option(help="Width x height in pixels.")] = "896x448",
    text: Annotated[int, typer.Option(min=1, help="Text tokens of each request.")] = 64,
    new: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="Of each turn.")] = 16,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each server; one more warms up.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Load two servers of vLLM's in turns, a stock one and one with a reduced prefill."""
    import vllm

    size = read_size(image_size)
    has_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        model = checkpoint
        if model is None:
            model = str(save_model(Path(folder) / "model"))
        urls = {}
        for name, reduction in ((STOCK, None), (OURS, {"retention": retention})):
            port = free_port()
            command = server_command(model, reduction, port, others or ())
            urls[name] = servers.enter_context(serving(command, port, Path(folder) / f"{name}.log"))
        turns = []
        for number in range(rounds + 1):
            turn = {}
            for name in (STOCK, OURS) if number % 2 else (OURS, STOCK):
                turn[name] = run_client(
                    client_options(urls[name], model, number, images, size, text, new, requests, concurrency)
                )
            turns.append(turn)
        turns = turns[1:]
    found = provenance(torch.device("cuda" if has_gpu else "cpu"))
    found["versions"]["vllm"] = vllm.__version__
    result = {
        "what": "vLLM's server, stock and with FastMMoE, by vLLM's client", **found,
        "environment": {n: v for n, v in sorted(os.environ.items()) if n.startswith(("OMP_", "VLLM_"))},
        "model": checkpoint or "random InternVL", "retention": retention, "images": images, "image_size": image_size,
        "text_tokens": text, "new_tokens": new, "requests": requests, "concurrency": concurrency, "rounds": rounds,
        "gains": gains(turns), "turns": turns,
    }  # fmt: skip
    write_json(result, json_path)
    print_report(result)


if __name__ == "__main__":
    typer.run(main)
