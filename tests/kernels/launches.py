"""Print what every op launches for some inputs, and every configuration that is compiled ahead of time, as JSON.

`test_launches.py` runs this in a process of its own: kernels must have been imported without Triton's interpreter.
Nothing is compiled and nothing runs; tensors stay uninitialised.
"""

import json
import os
import random
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import fastmmoe_kernels as fk
from fastmmoe_kernels.aot import divisible_by_16, shipped_variants
from fastmmoe_kernels.experts import kernel as experts_kernel

COMPILER = make_backend(GPUTarget("cuda", 90, 32))
BIASES = ("gate_up_bias", "down_bias")
launches: list[str] = []


def describe(name, types, constants, divisible, num_warps, num_stages) -> str:
    """All that Triton's compilation depends on."""
    arguments = [f"{key}={value}" for key, value in sorted(constants.items())]
    arguments += [f"{key}: {kind}{'/16' if key in divisible else ''}" for key, kind in sorted(types.items())]
    return f"{name}({', '.join(arguments)}) warps={num_warps} stages={num_stages}"


def record(kernel, *args, grid, warmup, **kwargs):
    """In place of `JITFunction.run`."""
    options = {"num_warps": 4, "num_stages": 3}
    options |= {key: kwargs.pop(key) for key in tuple(kwargs) if key in options}
    bind = create_function_from_signature(kernel.signature, kernel.params, COMPILER)
    _, specialization, _ = bind(*args, **kwargs)
    types, constants, divisible = {}, {}, set()
    for name, (kind, value) in zip(kernel.arg_names, specialization, strict=True):
        if kind == "constexpr":
            constants[name] = value
        else:
            types[name] = kind
            divisible |= {name} if "D" in (value or "") else set()
    launches.append(describe(kernel.__name__, types, constants, divisible, **options))


def describe_variant(variant) -> str:
    divisible = {variant.kernel.arg_names[index] for (index,) in divisible_by_16(variant)}
    name, stages = variant.kernel.__name__, variant.num_stages
    return describe(name, variant.signature, variant.constants, divisible, variant.num_warps, stages)


def launched(op, *args, **kwargs) -> list[str]:
    launches.clear()
    op(*args, backend="triton", **kwargs)
    return list(launches)


def ones(*shape):
    return torch.ones(shape, dtype=torch.bool)


def route(num_tokens, experts=128, top_k=8, dtype=torch.bfloat16, **options):
    logits = torch.empty(num_tokens, experts, dtype=dtype)
    return launched(fk.topk_routing, logits, top_k, vision_mask=ones(num_tokens), vision_top_k=top_k // 2, **options)


def gate(num_tokens, experts=128, top_k=8, width=2048, dtype=torch.bfloat16, padded=False, **options):
    hidden, weight = torch.empty(num_tokens, width, dtype=dtype), torch.empty(experts, width, dtype=dtype)
    masks = dict(vision_mask=ones(num_tokens), padding_mask=ones(num_tokens) if padded else None)
    return launched(fk.gate_routing, hidden, weight, top_k, vision_top_k=top_k // 2, **masks, **options)


def attend(
    num_keys, heads=32, kv_heads=4, head_dim=128, batch=1, dtype=torch.bfloat16, tokens_first=False, mask_rows=(),
    has_sinks=False,
):  # fmt: skip
    query = torch.empty(batch, heads, num_keys, head_dim, dtype=dtype)[:, :, -1]
    key = torch.empty(batch, kv_heads, num_keys, head_dim, dtype=dtype)
    if tokens_first:
        key = torch.empty(batch, num_keys, kv_heads, head_dim, dtype=dtype).transpose(1, 2)
    sinks = torch.empty(heads, dtype=dtype) if has_sinks else None
    mask = ones(batch, *mask_rows, num_keys)
    return launched(fk.last_query_attention, query, key, scale=0.1, key_mask=mask, sinks=sinks)


def prune(num_tokens, experts=128, features=2048, batch=1, dtype=torch.bfloat16):
    """As the first and as a later stage of a prefill."""
    hidden = torch.empty(batch, num_tokens, features, dtype=dtype)
    probs, importance = torch.empty(batch, num_tokens, experts), torch.empty(batch, num_tokens)
    layout = fk.VisionLayout.from_mask(ones(batch, num_tokens))
    source = torch.empty(batch, num_tokens, dtype=torch.int64)
    settings = dict(keep_ratio=0.79, merge_ratio=0.025, window=3, alpha=0.5, strategy="hybrid", merge_method="mlerp")
    return [
        launch
        for op, extra in ((fk.prune_tokens, {}), (fk.prune_batch, dict(source=source)))
        for launch in launched(op, hidden, hidden, probs, importance, layout, **settings, **extra)
    ]


def run_experts(
    num_tokens, experts=128, top_k=8, width=2048, intermediate=768, dtype=torch.bfloat16, transposed=False, **options
):
    hidden = torch.empty(num_tokens, width, dtype=dtype)
    rows = intermediate if options.get("activation") == "relu2" else 2 * intermediate
    shapes = [(rows, width), (width, intermediate)]
    if transposed:
        weights = [torch.empty(experts, *shape[::-1], dtype=dtype).mT for shape in shapes]
    else:
        weights = [torch.empty(experts, *shape, dtype=dtype) for shape in shapes]
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32)
    return launched(fk.moe_experts, hidden, *weights, ids, torch.empty(num_tokens, top_k), **options)


def run_gpt_oss(num_tokens):
    biases = (torch.empty(32, size, dtype=torch.bfloat16) for size in (5760, 2880))
    form = dict(activation="oai", limit=7.0, interleaved=True, transposed=True)
    return run_experts(num_tokens, 32, 4, 2880, 2880, **form, **dict(zip(BIASES, biases, strict=True)))


def main():
    JITFunction.run = record
    experts_kernel.device_target = lambda device: "sm_90"
    variants = [describe_variant(v) for v in shipped_variants() if "sm_90" in v.targets]
    # from here on the ops accept tensors on the CPU; the kernels are imported, so that nothing is interpreted
    os.environ["TRITON_INTERPRET"] = "1"
    lengths = (1, 2, 16, 33, 100, 512, 1000)
    # one length per row tile warms everything up: 16, 32, 64 and 128 rows
    batches = random.Random(0)
    report = {
        "variants": variants,
        "warm-up": [launch for n in (1, 300, 600, 16384) for launch in run_experts(n)],
        "batches": [run_experts(round(16384 ** batches.random())) for _ in range(50)],
        "lengths": {
            "routing": [route(n) for n in lengths],
            "routing, 72 experts": [route(n, 72, 6) for n in lengths],
            "gate": [gate(n) for n in lengths],
            "gate, padding": [gate(n, 72, 6, 2560, padded=True) for n in lengths],
            "attention": [attend(n) for n in lengths],
            "attention, batch": [attend(n, batch=3) for n in lengths],
            "attention, tokens first": [attend(n, tokens_first=True) for n in lengths],
            "attention, odd head": [attend(n, head_dim=7) for n in lengths],
            "attention, rows and sinks": [attend(n, mask_rows=(32,), has_sinks=True) for n in lengths],
            # a plan that prunes needs a few tokens
            "prune": [prune(n) for n in lengths[2:]],
            "prune, batch": [prune(n, batch=3) for n in lengths[2:]],
            # the row tile follows the pairs per expert: all of these share one
            "experts": [run_experts(n) for n in (4096, 4097, 5000, 6000)],
        },
        "models": {
            "InternVL3.5-30B-A3B": [
                *route(1892), *gate(1892), *gate(1892, padded=True), *gate(1892, padded=True, return_probs=True),
                *attend(1892), *attend(1892, batch=2), *prune(1892), *prune(1892, batch=2),
                *run_experts(1892), *run_experts(16384),
            ],
            "MiniMax-M3": [
                *attend(1892, 64), *attend(1892, 64, mask_rows=(4,)), *attend(1892, 64, batch=2, mask_rows=(64,)),
            ],
            "DeepSeek-VL2 Small": [
                *route(1500, 64, 6, dtype=torch.float32, norm_topk_prob=False), *attend(1500, 16, 16, 192),
                *gate(1500, 64, 6, norm_topk_prob=False, return_probs=True), *prune(1500, 64),
            ],
            "DeepSeek-VL2": [
                *route(1500, 72, 6, dtype=torch.float32, scoring="sigmoid", correction_bias=torch.empty(72)),
                *gate(1500, 72, 6, 2560, padded=True, scoring="sigmoid", correction_bias=torch.empty(72)),
                *attend(1500, 32, 32, 192), *run_experts(1500, 72, 6, 2560, 1536), *prune(1500, 72, 2560),
            ],
            "gpt-oss-20b": [
                *attend(1892, 64, 8, 64, has_sinks=True), *run_gpt_oss(1), *run_gpt_oss(2000),
                *gate(1500, 32, 4, 2880, bias=torch.empty(32, dtype=torch.bfloat16)),
            ],
            "Aria": [launch for n in (1, 4000) for launch in run_experts(n, 64, 6, 2560, 1664, transposed=True)],
            "Gemma-4-26B-A4B": [
                launch for n in (1, 4000) for launch in run_experts(n, 128, 8, 2816, 704, activation="gelu_tanh")
            ],
            "Nemotron-3-Nano": [
                launch for n in (1, 5000) for launch in run_experts(n, 128, 6, 2688, 1856, activation="relu2")
            ],
        },
    }  # fmt: skip
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
