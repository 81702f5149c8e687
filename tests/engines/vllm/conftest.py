"""Tests of the vLLM plugin: each engine runs in a process of its own, the reference in this one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

# a server's of its own
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # threads of several processes on few cores only wait for each other
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
RUNNERS = {
    "V1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    "V2": {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"},
}
# vLLM asks for nearly all memory to be free, whatever it takes
OPTIONS = {
    "gpu_memory_utilization": 0.2,
    "enforce_eager": True,
    "max_model_len": 700,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 4096,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    from .checkpoints import save

    made = {}

    def get(name):
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def engine(tmp_path):
    """(checkpoint directory, options of the engine, schedules, ...) -> what `engine.run` returns."""

    def run(directory, schedules, reduction=None, runner="V1", mutation="", environment=None, **options):
        if reduction is not None:
            options["additional_config"] = {"fastmmoe": reduction}
        spec, result = tmp_path / "spec.json", tmp_path / "result.json"
        spec.write_text(
            json.dumps(
                {
                    "directory": str(directory),
                    "options": OPTIONS | options,
                    "schedules": schedules,
                    "mutation": mutation,
                }
            )
        )
        inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.engines.vllm.engine", spec, result],
            env=inherited | ENVIRONMENT | RUNNERS[runner] | (environment or {}),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return json.loads(result.read_text()) | {"log": done.stdout + done.stderr}

    return run
