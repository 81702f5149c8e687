"""Compile every shipped kernel configuration on a machine with no GPU, and judge the machine code.

    python -m fastmmoe_kernels.aot [--targets sm_80,sm_90,sm_100,gfx942] [--kernels NAME] [--json FILE]
                                    [--write-baseline]

Each op's `kernel.py` lists its configurations in `aot_variants()`. A configuration fails when it does not compile,
spills registers to memory, or needs more shared memory than a block of the target may have. A GEMM also fails when

- on NVIDIA, its loads are not asynchronous copies of 16 bytes (or of what the variant says);
- on sm_90, it has 64 rows of a 16-bit type and no wgmma, waits for all wgmma in its main loop, takes A from
  registers, or may write to shared memory that another warpgroup still multiplies with;
- it got worse than the baseline of this Triton version (`baseline.py`): instructions per step of the main loop
  (NVIDIA), registers, shared memory, wgmma and wgmma in flight (sm_90). --write-baseline accepts it as it is.

Exit status: 0 all pass, 1 something failed, 2 wrong arguments or no Triton.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any

import fastmmoe_kernels
from fastmmoe_kernels.backend import TRITON_INSTALLED
from fastmmoe_kernels.baseline import FIGURES, compare, read_baseline, write_baseline
from fastmmoe_kernels.sass import MainLoop, read_main_loop
from fastmmoe_kernels.variant import KernelVariant

# shared memory that one block may have, bytes
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
WORKERS = 2


@dataclass(frozen=True)
class MachineCode:
    """What the compiler made of one configuration on one target.

    Attributes:
        registers: per thread (vector registers on AMD).
        spill_bytes: memory per thread for values that fit no register.
        shared_bytes: shared memory (LDS) per block.
        wgmma: wgmma instructions in the PTX.
        loop: the main loop of a GEMM on NVIDIA.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    loop: MainLoop | None = None


def find_problems(variant: KernelVariant, target: str, code: MachineCode) -> list[str]:
    """Why `code` must not ship; empty when it may."""
    problems = []
    if code.spill_bytes > 0:
        problems.append(f"spills {code.spill_bytes} bytes")
    if code.shared_bytes > SHARED_LIMIT[target]:
        problems.append(f"{code.shared_bytes} bytes of shared memory, the limit is {SHARED_LIMIT[target]}")
    is_16_bit = any("bf16" in kind or "fp16" in kind for kind in variant.signature.values())
    if variant.needs_wgmma and target == "sm_90" and is_16_bit and code.wgmma == 0:
        problems.append("16-bit GEMM without wgmma")
    return problems + (_find_loop_problems(code.loop, variant.load_bytes) if code.loop else [])


def _find_loop_problems(loop: MainLoop, load_bytes: int) -> list[str]:
    problems = []
    if loop.async_bytes is None:
        problems.append("no asynchronous loads")
    elif loop.async_bytes < load_bytes:
        problems.append(f"asynchronous loads of {loop.async_bytes} bytes, expected {load_bytes}")
    if loop.register_loads:
        problems.append(f"{loop.register_loads} loads into registers in the main loop, expected asynchronous ones")
    if loop.wgmma_in_flight == 0:
        problems.append("waits for all wgmma in the main loop: 0 groups in flight, expected 1 or more")
    if loop.unguarded_waits:
        problems.append(f"{loop.unguarded_waits} wgmma waits without a barrier before shared memory is written again")
    if loop.register_operands:
        problems.append(f"{loop.register_operands} wgmma take A from registers, expected shared memory")
    return problems


def compile_variant(variant: KernelVariant, target: str) -> MachineCode:
    """Compile for `target`, a key of `SHARED_LIMIT`, with the hints that a launch would give."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    wrong = (variant.signature.keys() | variant.constants.keys()) ^ set(variant.kernel.arg_names)
    if wrong:
        raise ValueError(f"signature and constants differ from the kernel's arguments in {', '.join(sorted(wrong))}")
    for param in variant.kernel.params:
        if param.do_not_specialize and param.name in variant.constants:
            raise ValueError(f"{param.name} is a constant here, but a launch would not specialise it")
    source = ASTSource(
        variant.kernel,
        {name: variant.signature.get(name, "constexpr") for name in variant.kernel.arg_names},
        variant.constants,
        divisible_by_16(variant),
    )
    is_amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if is_amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=gpu, options=options)
    shared = compiled.metadata.shared
    return _read_amd(compiled.asm, shared) if is_amd else _read_nvidia(compiled.asm, shared, variant.is_gemm)


def divisible_by_16(variant: KernelVariant) -> dict[tuple[int], list[Any]]:
    """The hints of `ASTSource`: what Triton would find out from the arguments of a launch."""
    attributes = {}
    for param in variant.kernel.params:
        kind = variant.signature.get(param.name, "")
        is_specialized = not (param.do_not_specialize or param.do_not_specialize_on_alignment)
        if kind.startswith(("*", "i")) and is_specialized and param.name not in variant.unaligned:
            attributes[(param.num,)] = [["tt.divisibility", 16]]
    return attributes


def _read_nvidia(asm: dict[str, Any], shared: int, is_gemm: bool) -> MachineCode:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        loop = read_main_loop(_output(knobs.nvidia.nvdisasm.path, "-c", file.name)) if is_gemm else None
    field = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # Triton's kernels have no stack of their own: what stands there are spilled registers
    return MachineCode(field["REG"], field["STACK"] + field["LOCAL"], shared, asm["ptx"].count("wgmma.mma_async"), loop)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_amd(asm: dict[str, Any], shared: int) -> MachineCode:
    names = "vgpr_count|vgpr_spill_count|private_segment_fixed_size"
    field = {name: int(value) for name, value in re.findall(rf"\.({names}):\s*(\d+)", asm["amdgcn"])}
    # scalar registers spill to lanes of vector registers; when those run out, to the private segment
    spilled = max(field["private_segment_fixed_size"], 4 * field["vgpr_spill_count"])
    return MachineCode(field["vgpr_count"], spilled, shared, 0)


@cache
def shipped_variants() -> list[KernelVariant]:
    """The variants of all ops, in an order that does not depend on the process."""
    variants = []
    for package in pkgutil.iter_modules(fastmmoe_kernels.__path__, "fastmmoe_kernels."):
        if package.ispkg:
            variants += importlib.import_module(f"{package.name}.kernel").aot_variants()
    return sorted(variants, key=lambda v: (v.kernel.__name__, str(v.signature), str(v.constants), v.num_warps))


def _list_jobs(targets: list[str], kernels: str) -> list[tuple[int, str]]:
    return [
        (index, target)
        for index, variant in enumerate(shipped_variants())
        if kernels in variant.kernel.__name__
        for target in targets
        if target in variant.targets
    ]


def _run_job(index: int, target: str) -> dict[str, Any]:
    """One line of the report."""
    warnings.filterwarnings("ignore", module="triton")
    variant = shipped_variants()[index]
    record = {
        "kernel": variant.kernel.__name__,
        "config": variant.constants | {"num_warps": variant.num_warps, "num_stages": variant.num_stages},
        "types": variant.signature,
        "target": target,
        "is_gemm": variant.is_gemm,
    }
    try:
        code = compile_variant(variant, target)
    except Exception as error:  # whatever the compiler throws belongs in the report, beside the other kernels
        reason = str(error).strip().splitlines()
        problem = f"does not compile: {type(error).__name__}: {reason[-1] if reason else ''}"
        return record | dict.fromkeys(MachineCode.__dataclass_fields__) | {"problems": [problem]}
    return record | asdict(code) | {"problems": find_problems(variant, target, code)}


def compile_all(targets: list[str], kernels: str = "") -> list[dict[str, Any]]:
    """Compile the variants of kernels whose name contains `kernels`, in two processes; one record per line."""
    # a kernel imported under the interpreter cannot be compiled: only the workers import them, and without it
    os.environ.pop("TRITON_INTERPRET", None)
    records = {}
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        jobs = pool.submit(_list_jobs, targets, kernels).result()
        running = {pool.submit(_run_job, *job): job for job in jobs}
        for done, future in enumerate(as_completed(running), 1):
            record = records[running[future]] = future.result()
            if sys.stderr.isatty():
                line = f"{done}/{len(jobs)} {record['kernel']} {record['target']}"
                print(f"\r{line:<100}", end="" if done < len(jobs) else "\n", file=sys.stderr, flush=True)
            elif done * 10 // len(jobs) > (done - 1) * 10 // len(jobs):
                print(f"compiled {done}/{len(jobs)}", file=sys.stderr, flush=True)
    return [records[job] for job in jobs]


def configuration_name(record: dict[str, Any]) -> str:
    """As the baseline has it: everything that a configuration was compiled from."""
    config = (f"{name}={value}" for name, value in record["config"].items())
    return " ".join([record["kernel"], record["target"], ",".join(record["types"].values()), *config])


def _figures(record: dict[str, Any]) -> dict[str, float]:
    """What the baseline has of a GEMM; what is None or 0 is left out."""
    both = record | (record["loop"] or {})
    return {name: both[name] for name in FIGURES if both.get(name)}


def compare_all(
    records: list[dict[str, Any]], baseline: dict[str, dict[str, float]], targets: list[str], kernels: str
) -> tuple[list[str], list[str]]:
    """Add to the records' problems what is worse than the baseline; improvements, and what is no longer shipped."""
    improvements, names = [], {configuration_name(record) for record in records}
    for record in records:
        if record["is_gemm"] and record["registers"] is not None:
            accepted = baseline.get(configuration_name(record))
            if accepted is None:
                record["problems"].append("no baseline; run with --write-baseline")
            else:
                worse, better = compare(accepted, _figures(record))
                record["problems"] += worse
                improvements += [f"{configuration_name(record)}: {change}" for change in better]
    return improvements, sorted(baseline.keys() - names - set(_not_asked_for(baseline, targets, kernels)))


def accept(
    records: list[dict[str, Any]], baseline: dict[str, dict[str, float]], targets: list[str], kernels: str
) -> dict[str, dict[str, float]]:
    """The baseline with the records' figures; what was not asked for, or does not compile, keeps its own."""
    gemms = {configuration_name(record): record for record in records if record["is_gemm"]}
    new = {name: _figures(record) for name, record in gemms.items() if record["registers"] is not None}
    kept = {*_not_asked_for(baseline, targets, kernels), *gemms}
    return {name: figures for name, figures in baseline.items() if name in kept} | new


def _not_asked_for(baseline: dict[str, dict[str, float]], targets: list[str], kernels: str) -> list[str]:
    """Configurations of other targets and kernels than these."""
    asked = [(name, *name.split()[:2]) for name in baseline]
    return [name for name, kernel, target in asked if kernels not in kernel or target not in targets]


def _print_table(records: list[dict[str, Any]]) -> None:
    print(
        f"{'kernel':<26} {'target':<7} {'registers':>9} {'spill':>6} {'shared':>7} {'wgmma':>5} {'in flight':>9} "
        f"{'instr/step':>10}  config"
    )
    for record in records:
        loop = record["loop"] or {}
        numbers = [record[name] for name in ("registers", "spill_bytes", "shared_bytes", "wgmma")]
        numbers += [loop.get("wgmma_in_flight"), loop.get("instructions")]
        registers, spill, shared, wgmma, in_flight, steps = ("-" if n is None else n for n in numbers)
        steps = f"{steps}{'*' if loop.get('is_unrolled') else ' '}"
        pointer = next(iter(record["types"].values()), "")
        config = " ".join([pointer, *(f"{name}={value}" for name, value in record["config"].items())])
        print(
            f"{record['kernel']:<26} {record['target']:<7} {registers:>9} {spill:>6} {shared:>7} {wgmma:>5} "
            f"{in_flight:>9} {steps:>10}  {config}"
        )
    if any(record["loop"] and record["loop"]["is_unrolled"] for record in records):
        print("* no loop is left: mean of its steps")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastmmoe_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--targets", default=",".join(SHARED_LIMIT), metavar="LIST", help="comma-separated (default: %(default)s)"
    )
    parser.add_argument("--kernels", default="", metavar="NAME", help="only kernels whose name contains NAME")
    parser.add_argument("--json", metavar="FILE", help="write the report there too, a list of objects")
    parser.add_argument(
        "--write-baseline", action="store_true", help="accept the figures of the GEMMs, for the Triton that runs"
    )
    args = parser.parse_args(argv)
    targets = list(dict.fromkeys(args.targets.split(",")))
    if unknown := [target for target in targets if target not in SHARED_LIMIT]:
        parser.error(f"--targets: unknown {', '.join(map(repr, unknown))}; known are {', '.join(SHARED_LIMIT)}")
    if not TRITON_INSTALLED:
        parser.error("Triton is not installed (pip install 'fastmmoe[triton]')")
    import triton

    # what can be refused is, before minutes of compilation
    try:
        baseline = read_baseline(triton.__version__)
    except ValueError as error:
        if not args.write_baseline:
            parser.error(str(error))
        baseline = None
    if args.json:
        try:
            open(args.json, "a", encoding="utf-8").close()
        except OSError as error:
            parser.error(f"--json: {args.json}: {error.strerror}")
    records = compile_all(targets, args.kernels)
    if not records:
        parser.error(f"--kernels: no kernel's name contains {args.kernels!r}")
    improvements, stale = [], []
    if args.write_baseline:
        accepted = accept(records, baseline or {}, targets, args.kernels)
        print(f"wrote {write_baseline(triton.__version__, accepted)}")
    elif baseline is None:
        print(f"Triton {triton.__version__} has no baseline: figures are not compared")
    else:
        improvements, stale = compare_all(records, baseline, targets, args.kernels)
    _print_table(records)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(records, file, indent=1, default=str)
    for improvement in improvements:
        print(f"better: {improvement}")
    if improvements:
        print("accept what is better with --write-baseline")
    for name in stale:
        print(f"FAIL: {name}: in the baseline, no longer shipped; run with --write-baseline")
    for record in records:
        for problem in record["problems"]:
            print(f"FAIL: {configuration_name(record)}: {problem}")
    failed = sum(bool(record["problems"]) for record in records)
    print(f"{len(records)} compiled, {failed} failed" + (f", {len(stale)} of the baseline stale" if stale else ""))
    return 1 if failed or stale else 0


if __name__ == "__main__":
    sys.exit(main())
