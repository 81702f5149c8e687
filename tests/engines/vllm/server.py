"""vLLM's own server in a process of its own, and a client that says what a user's would."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import psutil
from PIL import Image

from .conftest import ENVIRONMENT, ROOT, RUNNERS

# in processes of its own; with more threads than its share of the cores it is ten times slower
SERVER_ENVIRONMENT = {name: value for name, value in ENVIRONMENT.items() if "MULTIPROCESSING" not in name}
SERVER_ENVIRONMENT |= RUNNERS["V1"] | {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
# without them a stock server's memory grows by 50 MiB in 200 requests: kernels kept for every number of tokens
STEADY_MEMORY = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def complete(text: str) -> str:
    """Without what vLLM holds back at an answer's end: the bytes of a character that was not finished."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}").strip()


Part = str | bytes  # a text, or a file of a picture


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def free_port() -> int:
    for port in range(18000, 19000):
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port in 18000-18999")


class Server:
    """A server that `command` starts, which is given the port; for a `with` statement.

    Args:
        command: its words.
        model: what it calls its model.
        log: file for all that it says.
    """

    def __init__(self, command: Sequence[str], model: str, log: Path):
        self.command, self.model, self._log = list(command), model, log

    def __enter__(self) -> Server:
        port = free_port()
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self.command, "--port", str(port), "--host", "127.0.0.1"],
                env=inherited | SERVER_ENVIRONMENT | STEADY_MEMORY,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that all its processes can be ended
            )
        # a connection each: the server closes one on which it has failed
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=120, limits=httpx.Limits(max_keepalive_connections=0)
        )
        return self

    def wait(self, seconds: float = 300) -> None:
        """Until it answers."""
        end = time.monotonic() + seconds
        while not self.is_healthy():
            assert self._process.poll() is None and time.monotonic() < end, self.log()[-6000:]
            time.sleep(0.25)

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

    def is_healthy(self) -> bool:
        try:
            return self._client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def memory(self) -> int:
        """Bytes that all its processes have resident."""
        main = psutil.Process(self._process.pid)
        return sum(process.memory_info().rss for process in (main, *main.children(recursive=True)))

    def chat(self, parts: Sequence[Part], new_tokens: int, **options: object) -> httpx.Response:
        """A turn of a conversation."""
        return self._client.post("/v1/chat/completions", json=self._body(parts, new_tokens, options))

    def answer(self, parts: Sequence[Part], new_tokens: int) -> str:
        response = self.chat(parts, new_tokens)
        assert response.status_code == 200, response.text[:500]
        return complete(response.json()["choices"][0]["message"]["content"])

    def stream(self, parts: Sequence[Part], new_tokens: int) -> Iterator[str]:
        """The answer, piece by piece; whoever stops early closes the connection."""
        body = self._body(parts, new_tokens, {"stream": True})
        with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, response.read()[:500]
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""

    def _body(self, parts: Sequence[Part], new_tokens: int, options: dict[str, object]) -> dict[str, object]:
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {
                "type": "image_url",
                "image_url": {"url": "data:image/png;base64," + base64.b64encode(part).decode()},
            }
            for part in parts
        ]
        turn = {"role": "user", "content": content}
        return {"model": self.model, "messages": [turn], "temperature": 0, "max_tokens": new_tokens} | options

    def metrics(self, prefix: str = "fastmmoe:") -> dict[str, float]:
        """What Prometheus reads, by name, with the reason behind a slash where there is one."""
        values = {}
        for line in self._client.get("/metrics").text.splitlines():
            if line.startswith(prefix) and "_created" not in line:
                labels, value = line.rsplit(" ", 1)
                reason = re.search(r'reason="(\w+)"', labels)
                name = labels.split("{")[0].removeprefix(prefix).removesuffix("_total")
                values[f"{name}/{reason[1]}" if reason else name] = float(value)
        return values

    def wait_until_idle(self, seconds: float = 30) -> dict[str, float]:
        """Until no request runs and no cache is held; vLLM's own gauges."""
        end = time.monotonic() + seconds
        while True:
            gauges = self.metrics("vllm:")
            busy = gauges["num_requests_running"], gauges["num_requests_waiting"], gauges["kv_cache_usage_perc"]
            if not any(busy) or time.monotonic() > end:
                return gauges
            time.sleep(0.2)
