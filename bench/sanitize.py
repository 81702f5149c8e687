"""Run random cases of every op under each tool of NVIDIA's compute-sanitizer.

    python bench/sanitize.py --cases 5 --json FILE

The cases are those of `tests/kernels/fuzz.py`, in a process per tool. memcheck looks for accesses out of bounds (with
an allocation for each tensor, not torch's cache, in which neighbours hide them), racecheck for two threads at one place
of shared memory, initcheck for reads of what nobody wrote, synccheck for barriers that not all threads reach. Exit
status 1 if a tool found something or a case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER = "compute-sanitizer"
FOUND = 86  # exit status of a run in which a tool found something


def command(tool: str | None) -> list[str]:
    """What runs the cases under a tool; None: under none."""
    cases = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_fuzz.py"]
    if tool is None:
        return cases
    # children: pytest itself starts none, a compiler that Triton starts is not to be looked at
    return [SANITIZER, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only", *cases]


def errors_in(output: str) -> int | None:
    """How many errors a tool counts in its summary; None: there is no summary."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    return sum(int(a or b) for a, b in found) if found else None


def run(tool: str | None, cases: int, seed: int, seconds: float) -> dict:
    """One tool's result: exit status, errors counted, the end of the output if it is not clean."""
    environment = os.environ | {
        "FASTMMOE_FUZZ_CASES": str(cases),
        "FASTMMOE_FUZZ_SEED": str(seed),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "FASTMMOE_NO_POISON": "1",  # what tests write into new tensors, initcheck would take for values
    }
    process = subprocess.Popen(
        command(tool), cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, status = process.communicate(timeout=seconds)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what the tool has started, too
        output, status = process.communicate()[0] + f"\nstopped after {seconds:.0f} s", None
    result = {"status": status, "errors": errors_in(output)}
    return result if is_clean(tool, result) else result | {"output": output[-8000:]}


def is_clean(tool: str | None, result: dict) -> bool:
    """Whether all cases passed, and a tool says that it looked and found nothing."""
    return result["status"] == 0 and (tool is None or result["errors"] == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only this one; repeat for several")
    parser.add_argument("--without", action="store_true", help="run the cases without a tool: does this script work?")
    parser.add_argument("--cases", type=int, default=5, help="of each op")
    parser.add_argument("--seed", type=int, default=0, help="the first case's")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all tools")
    parser.add_argument("--json", type=Path, help="file for the results")
    given = parser.parse_args()
    if not given.without and shutil.which(SANITIZER) is None:
        parser.error(f"{SANITIZER} is not on the PATH; it comes with the CUDA toolkit")
    tools = [None] if given.without else given.tool or TOOLS
    results = {}
    for tool in tools:
        results[tool or "none"] = result = run(tool, given.cases, given.seed, given.budget / len(tools))
        print(f"{tool or 'no tool'}: status {result['status']}, {result['errors']} errors", flush=True)
        if "output" in result:
            print(result["output"], flush=True)
    if given.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        settings = {"cases": given.cases, "seed": given.seed, "device": device, "date": date.today().isoformat()}
        given.json.write_text(json.dumps(settings | versions | {"tools": results}, indent=1) + "\n")
    sys.exit(not all(is_clean(tool, results[tool or "none"]) for tool in tools))


if __name__ == "__main__":
    main()
