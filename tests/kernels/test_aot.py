"""Ahead-of-time compilation: the command, its judgement, and that it covers every kernel."""

import ast
import dataclasses
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

import fastmmoe_kernels
from fastmmoe_kernels.aot import SHARED_LIMIT, MachineCode, find_problems, main, shipped_variants
from fastmmoe_kernels.baseline import baseline_path
from fastmmoe_kernels.sass import MainLoop
from fastmmoe_kernels.variant import KernelVariant

ROOT = Path(fastmmoe_kernels.__file__).parents[1]
GOOD = MachineCode(registers=190, spill_bytes=0, shared_bytes=147456, wgmma=4)
LOOP = MainLoop(
    instructions=120.0, products=8.0, is_unrolled=False, async_bytes=16, register_loads=0, wgmma_in_flight=2,
    unguarded_waits=0, register_operands=0, proxy_fences=1,
)  # fmt: skip
GEMM = KernelVariant(None, {"a": "*bf16", "out": "*bf16", "rows": "i32"}, {}, is_gemm=True, needs_wgmma=True)


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
        assert record["loop"] is None and not record["is_gemm"]
        assert 0 < record["shared_bytes"] < 65536
    assert f"{len(records)} compiled, 0 failed" in result.stdout
    for column in ("kernel", "target", "registers", "spill", "shared", "wgmma", "in flight", "instr/step", "config"):
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
        (dataclasses.replace(GEMM, needs_wgmma=False), "sm_90", dict(wgmma=0), None),
        (dataclasses.replace(GEMM, signature={"a": "*fp32"}), "sm_90", dict(wgmma=0), None),
        (dataclasses.replace(GEMM, signature={"a": "tensordesc<fp16[64,64]>"}), "sm_90", dict(wgmma=0), "wgmma"),
    ],
)
def test_judgement(variant, target, change, problem):
    problems = find_problems(variant, target, dataclasses.replace(GOOD, **change))
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(), None),
        (dict(wgmma_in_flight=None), None),
        (dict(proxy_fences=0), None),  # Triton 3.6 has none
        (dict(async_bytes=None), "no asynchronous loads"),
        (dict(async_bytes=8), "asynchronous loads of 8 bytes, expected 16"),
        (dict(register_loads=3), "3 loads into registers in the main loop"),
        (dict(wgmma_in_flight=0), "waits for all wgmma in the main loop"),
        (dict(unguarded_waits=2), "2 wgmma waits without a barrier"),
        (dict(register_operands=4), "4 wgmma take A from registers"),
    ],
)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_judgement_of_the_main_loop(change, problem, target):
    code = dataclasses.replace(GOOD, loop=dataclasses.replace(LOOP, **change))
    problems = find_problems(GEMM, target, code)
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_tiles_with_few_elements_may_load_less():
    code = dataclasses.replace(GOOD, loop=dataclasses.replace(LOOP, async_bytes=8))
    assert find_problems(dataclasses.replace(GEMM, load_bytes=8), "sm_90", code) == []
    assert len(find_problems(dataclasses.replace(GEMM, load_bytes=16), "sm_90", code)) == 1


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
    return KernelVariant(matmul_kernel, signature, {"M": m, "N": n, "K": k}, **options, is_gemm=True, needs_wgmma=True)


def aot_variants():
    return [
        variant(128, 256, 64, num_warps=8),
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
        "--write-baseline", cwd=tmp_path, PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "5 compiled, 4 failed" in result.stdout
    records = {(r["config"]["M"], r["config"]["N"], r["config"]["K"]): r for r in json.loads(file.read_text())}
    good, spilling, oversized, small, broken = (
        records[shape] for shape in ((128, 256, 64), (256, 256, 16), (128, 256, 128), (16, 64, 64), (1, 1, 1))
    )
    assert good["problems"] == [] and good["wgmma"] > 0
    assert spilling["spill_bytes"] > 0 and spilling["registers"] == 255
    assert spilling["problems"][0] == f"spills {spilling['spill_bytes']} bytes"
    assert oversized["problems"][0] == (f"{oversized['shared_bytes']} bytes of shared memory, the limit is 232448")
    assert small["problems"] == ["16-bit GEMM without wgmma"]
    assert "does not compile" in broken["problems"][0] and broken["registers"] is None


LAYER = "_Layer(128, 8, 2048, 768)"
LARGEST_TILE = ("gate_up_kernel sm_90 *bf16", " H=2048 I=768 ", "BLOCK_M=128")


def compile_gate_up(tmp_path, **changes):
    """Compile the largest tile of one layer's gate_up GEMM in a copy of the package, with texts replaced in a file."""
    package = tmp_path / "fastmmoe_kernels"
    shutil.copytree(ROOT / "fastmmoe_kernels", package, ignore=shutil.ignore_patterns("__pycache__"))
    file = package / "experts" / "kernel.py"
    head, layers, rest = re.split(r"(^LAYERS = \[.*?^\]$)", file.read_text(), flags=re.S | re.M)
    text = f"{head}LAYERS = [{LAYER}]{rest}"
    for before, after in [("(min(most), math.inf)", "(math.inf,)"), *changes.items()]:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    file.write_text(text)
    baseline = package / "aot_baseline" / baseline_path(triton.__version__).name
    start, *lines, end = baseline.read_text().splitlines()
    [line] = [line.rstrip(",") for line in lines if all(part in line for part in LARGEST_TILE)]
    baseline.write_text("\n".join([start, line, end]))
    return run_python(
        "-m", "fastmmoe_kernels.aot", "--kernels", "gate_up", "--targets", "sm_90", cwd=tmp_path,
        PYTHONPATH=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip


def test_real_kernel_compiles_to_its_baseline(tmp_path):
    """Without a change: the same figures, from an empty cache."""
    result = compile_gate_up(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 compiled, 0 failed\n" in result.stdout and "better" not in result.stdout


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        pytest.param(
            {'"num_stages": tile.num_stages': '"num_stages": 1'},
            ["no asynchronous loads", "waits for all wgmma in the main loop", "no baseline; run with --write-baseline",
             "in the baseline, no longer shipped"],
            id="one buffer",
        ),
        pytest.param(
            {"needs_wgmma=tiles.block_m >= 64,": 'needs_wgmma=True, unaligned=signature.keys() & {"stride_token"},'},
            [r"\d+ loads into registers in the main loop", "waits for all wgmma", r"instructions per .* \(\+\d\d %\)",
             r"\d+ -> 2\d\d registers \(\+\d\d %\)", r"[12] -> 0 groups of wgmma in flight"],
            id="narrow loads",
        ),
        pytest.param(
            {"        gate = tl.dot(x": "        x = (x.to(tl.float32) * 2.0).to(x.dtype)\n        gate = tl.dot(x"},
            [r"\d wgmma take A from registers", r"instructions per .* \(\+\d\d %\)", r"registers \(\+\d\d %\)"],
            id="operand in registers",
        ),
        pytest.param(
            {'"BLOCK_N": tile.block_n': '"BLOCK_N": 256'},
            [r"spills \d{3,} bytes", r"\d+ bytes of shared memory, the limit is 232448", "no baseline"],
            id="tile too large",
        ),
        pytest.param(
            {" x = tl.load(x_ptrs)\n": " x = tl.load(x_ptrs, mask=inner[None, :] + k < 256 * top_k, other=0.0)\n"},
            [r"\d+ -> \d+ instructions per step of the main loop \(\+\d %\)"],
            id="mask in the loop",
        ),
    ],
)  # fmt: skip
def test_spoiled_real_kernel_fails(changes, problems, tmp_path):
    result = compile_gate_up(tmp_path, **changes)
    assert result.returncode == 1, result.stdout + result.stderr
    failures = [line for line in result.stdout.splitlines() if line.startswith("FAIL: gate_up_kernel sm_90 *bf16")]
    for problem in problems:
        assert any(re.search(problem, line) for line in failures), (problem, result.stdout)


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
