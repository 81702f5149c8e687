"""Ahead-of-time compilation: the command, its judgement, and that it covers every kernel."""

import ast
import dataclasses
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastmmoe_kernels
from fastmmoe_kernels.aot import SHARED_LIMIT, MachineCode, find_problems, main, shipped_variants
from fastmmoe_kernels.variant import KernelVariant

ROOT = Path(fastmmoe_kernels.__file__).parents[1]
GOOD = MachineCode(registers=190, spill_bytes=0, shared_bytes=147456, wgmma=4)
GEMM = KernelVariant(None, {"a": "*bf16", "out": "*bf16", "rows": "i32"}, {}, is_gemm=True)


def run_python(*arguments, cwd=None, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True)


def test_command_reports_every_configuration(tmp_path):
    """With TRITON_INTERPRET set, as in this test session: the command must compile nevertheless."""
    file = tmp_path / "report.json"
    result = run_python(
        "-m", "fastmmoe_kernels.aot", "--kernels", "attention_mean", "--targets", "sm_90,gfx942", "--json", str(file),
        TRITON_INTERPRET="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    records = json.loads(file.read_text())
    variants = [v for v in shipped_variants() if "attention_mean" in v.kernel.__name__]
    assert {record["target"] for record in records} == {"sm_90", "gfx942"}
    assert len(records) == 2 * len(variants) > 0
    for record in records:
        assert record["kernel"] == "attention_mean_kernel"
        assert record["config"]["BLOCK_N"] == 128 and record["config"]["num_warps"] == 4
        assert 16 <= record["registers"] <= 255
        assert record["spill_bytes"] == 0 and record["wgmma"] == 0 and record["problems"] == []
        assert 0 < record["shared_bytes"] < 65536
    assert f"{len(records)} compiled, 0 failed" in result.stdout
    for column in ("kernel", "target", "registers", "spill", "shared", "wgmma", "config"):
        assert column in result.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("targets", "message"),
    [("sm_90,sm_12", "unknown 'sm_12'; known are sm_80, sm_90, sm_100, gfx942"), ("", "unknown ''")],
)
def test_unknown_targets(targets, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--targets", targets])
    assert message in capsys.readouterr().err


def test_unknown_kernels():
    result = run_python("-m", "fastmmoe_kernels.aot", "--kernels", "no_such_kernel", "--targets", "sm_80")
    assert result.returncode == 2
    assert "no kernel's name contains 'no_such_kernel'" in result.stderr and "Traceback" not in result.stderr


def test_without_triton():
    script = "import sys; sys.modules['triton'] = None; from fastmmoe_kernels.aot import main; sys.exit(main([]))"
    result = run_python("-c", script)
    assert result.returncode == 2
    assert "Triton is not installed" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("variant", "target", "change", "problem"),
    [
        (GEMM, "sm_90", dict(), None),
        (GEMM, "sm_90", dict(spill_bytes=4), "spills 4 bytes"),
        (GEMM, "gfx942", dict(spill_bytes=4, shared_bytes=0), "spills 4 bytes"),
        (GEMM, "sm_90", dict(shared_bytes=232448), None),
        (GEMM, "sm_90", dict(shared_bytes=232449), "the limit is 232448"),
        (GEMM, "sm_80", dict(shared_bytes=166913), "the limit is 166912"),
        (GEMM, "sm_100", dict(shared_bytes=232449), "the limit is 232448"),
        (GEMM, "gfx942", dict(shared_bytes=65537), "the limit is 65536"),
        (GEMM, "gfx942", dict(shared_bytes=65536, wgmma=0), None),
        (GEMM, "sm_90", dict(wgmma=0), "without wgmma"),
        (GEMM, "sm_80", dict(wgmma=0), None),
        (dataclasses.replace(GEMM, is_gemm=False), "sm_90", dict(wgmma=0), None),
        (dataclasses.replace(GEMM, signature={"a": "*fp32"}), "sm_90", dict(wgmma=0), None),
        (dataclasses.replace(GEMM, signature={"a": "tensordesc<fp16[64,64]>"}), "sm_90", dict(wgmma=0), "wgmma"),
    ],
)
def test_judgement(variant, target, change, problem):
    problems = find_problems(variant, target, dataclasses.replace(GOOD, **change))
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


BAD_KERNELS = '''
import triton
import triton.language as tl

from fastmmoe_kernels.variant import KernelVariant


@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    out = tl.zeros((M, N), tl.float32)
    for step in range(steps):
        a = tl.load(a_ptr + m * K + k[None, :] + step * K)
        b = tl.load(b_ptr + k[:, None] * N + n + step * K * N)
        out = tl.dot(a, b, out)
    tl.store(out_ptr + m * N + n, out)


def variant(m, n, k, **options):
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "steps": "i32"}
    return KernelVariant(matmul_kernel, signature, {"M": m, "N": n, "K": k}, is_gemm=True, **options)


def aot_variants():
    return [
        variant(128, 128, 64, num_warps=8),
        variant(256, 256, 16),  # 512 accumulators per thread
        variant(128, 256, 128, num_warps=8),  # 3 stages of 96 KB
        variant(16, 64, 64),  # too few rows for wgmma
        KernelVariant(matmul_kernel, {}, {"M": 1, "N": 1, "K": 1}),
    ]
'''


def test_bad_kernels_fail_in_a_real_compilation(tmp_path):
    """A copy of the package with one more op: a good kernel, and one for each way to fail."""
    package = tmp_path / "fastmmoe_kernels"
    shutil.copytree(ROOT / "fastmmoe_kernels", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "bad").mkdir()
    (package / "bad" / "__init__.py").touch()
    (package / "bad" / "kernel.py").write_text(BAD_KERNELS)
    file = tmp_path / "report.json"
    result = run_python(
        "-m", "fastmmoe_kernels.aot", "--kernels", "matmul", "--targets", "sm_90", "--json", str(file),
        cwd=tmp_path, PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "5 compiled, 4 failed" in result.stdout
    records = {(r["config"]["M"], r["config"]["N"], r["config"]["K"]): r for r in json.loads(file.read_text())}
    good, spilling, oversized, small, broken = (
        records[shape] for shape in ((128, 128, 64), (256, 256, 16), (128, 256, 128), (16, 64, 64), (1, 1, 1))
    )
    assert good["problems"] == [] and good["wgmma"] > 0
    assert spilling["spill_bytes"] > 0 and spilling["registers"] == 255
    assert spilling["problems"] == [f"spills {spilling['spill_bytes']} bytes"]
    assert oversized["problems"] == [f"{oversized['shared_bytes']} bytes of shared memory, the limit is 232448"]
    assert small["problems"] == ["16-bit GEMM without wgmma"]
    assert "does not compile" in broken["problems"][0] and broken["registers"] is None


def find_launched_kernels():
    """Names of the kernels in `name[grid](...)`, over all modules of the package."""
    launched, modules = set(), []
    for info in pkgutil.walk_packages(fastmmoe_kernels.__path__, "fastmmoe_kernels."):
        modules.append(importlib.import_module(info.name))
        for node in ast.walk(ast.parse(Path(modules[-1].__file__).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add((modules[-1], ast.unparse(node.func.value)))
    return {getattr(module, name) for module, name in launched}


def test_every_launched_kernel_is_compiled():
    launched = find_launched_kernels()
    compiled = {variant.kernel for variant in shipped_variants()}
    assert len(launched) >= 2
    assert {kernel.__name__ for kernel in launched - compiled} == set()


def test_every_variant_names_known_targets():
    for variant in shipped_variants():
        assert variant.targets and set(variant.targets) <= SHARED_LIMIT.keys()
