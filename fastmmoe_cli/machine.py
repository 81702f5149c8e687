"""What this machine offers to FastMMoE, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.utils import is_torch_flex_attn_available

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.families import find_preset
from fastmmoe.methods.fastmmoe import PresetTooDeepError
from fastmmoe.versions import TESTED, installed, is_tested, tested_range
from fastmmoe_cli.extras import EXTRAS, missing_of
from fastmmoe_cli.flash import offered, taken
from fastmmoe_cli.videos import DECODER
from fastmmoe_kernels.backend import resolve_backend


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        group: "software", "device", "attention", "backend", "extras", and "models" or "model".
        name: what was looked for.
        found: what there is, in words.
        ok: False if FastMMoE does less, or is slower, without it.
        advice: how to get it; empty when there is nothing to do.
    """

    group: str
    name: str
    found: str
    ok: bool = True
    advice: str = ""


def examine(config: PreTrainedConfig | None = None) -> list[Finding]:
    """Look at this machine, and at a model with this config or else at all; asks a device no more than what it is.

    Raises:
        ValueError: transformers has no multimodal model with this config.
    """
    models = _models() if config is None else _model(config)
    return [*_software(), *_device(), *_attention(config), _backend(), *_extras(), *models]


def _software() -> list[Finding]:
    torchvision, decoder = installed("torchvision"), installed(DECODER)
    # torchvision must match torch's build
    advice = "for videos, and for the pictures of some families: https://pytorch.org/get-started"
    return [
        Finding("software", "fastmmoe", fastmmoe.__version__),
        Finding("software", "Python", platform.python_version()),
        *map(_tested, TESTED),
        Finding(
            "software",
            "torchvision",
            torchvision or "not installed",
            advice="" if torchvision else advice,
        ),
        Finding(
            "software",
            "PyAV",
            decoder or "not installed",
            advice="" if decoder else f"for video files other than animated GIF, WebP and PNG: pip install {DECODER}",
        ),
    ]


def _tested(name: str) -> Finding:
    advice = "" if is_tested(name) else f"tested with {tested_range(name)}: pip install '{name}=={TESTED[name][1]}.*'"
    found = torch.__version__ if name == "torch" else installed(name)  # with its build
    return Finding("software", name, found or "not installed", ok=not advice, advice=advice)


def _device() -> list[Finding]:
    cores = os.cpu_count()
    findings = [Finding("device", "CPU", f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        built_for = torch.version.cuda or torch.version.hip
        advice = (
            f"torch is built for {built_for} but sees no GPU: check the driver (nvidia-smi, rocm-smi)"
            if built_for
            else "this torch is a CPU build: with a GPU, install a CUDA or ROCm build (https://pytorch.org/get-started)"
        )
        return [*findings, Finding("device", "GPU", "none", ok=False, advice=advice)]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        gib = device.total_memory / 2**30
        found = f"{device.name}, compute capability {device.major}.{device.minor}, {gib:.0f} GiB"
        findings.append(Finding("device", f"GPU {index}", found))
    return findings


def _attention(config: PreTrainedConfig | None) -> list[Finding]:
    has_gpu = torch.cuda.is_available()
    flash = offered(torch.cuda.get_device_capability()[0] if has_gpu else None)
    how = "pip install --no-build-isolation 'fastmmoe[flash-attn]', or pip install 'transformers[kernels]'"
    advice = "" if flash else f"optional: {how}" if has_gpu else "optional, needs a GPU"
    findings = [
        Finding("attention", "sdpa", "available, and what a model takes unless told otherwise"),
        Finding("attention", "eager", "available"),
        *(Finding("attention", name, found) for name, found in flash.items()),
        *([] if flash else [Finding("attention", "flash attention", "not available", advice=advice)]),
        Finding("attention", "flex", "available" if is_torch_flex_attn_available() else "not available"),
    ]
    if config is not None:
        takes = ", ".join(f"{name} ({found})" for name, found in taken(config, flash).items())
        advice = "choose it by from_pretrained(..., attn_implementation=...)" if takes else ""
        none = "takes none of these" if flash else "takes no flash attention here: none is available"
        findings.append(Finding("attention", config.model_type, takes or none, advice=advice))
    return findings


def _backend() -> Finding:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = resolve_backend("auto", torch.empty(0, device=device))
    if backend == "triton" or device.type == "cpu":
        return Finding("backend", "auto", f"{backend}, on {device.type}")
    advice = "the GPU kernels need Triton: pip install 'fastmmoe[triton]'"
    return Finding("backend", "auto", f"{backend}, on {device.type}", ok=False, advice=advice)


def _extras() -> list[Finding]:
    findings = []
    for extra, modules in EXTRAS.items():
        missing = missing_of(modules)
        findings.append(
            Finding(
                "extras",
                extra,
                f"missing {', '.join(missing)}" if missing else "installed",
                ok=not missing,
                advice=f"pip install 'fastmmoe[{extra}]'" if missing else "",
            )
        )
    return findings


def _model(config: PreTrainedConfig) -> list[Finding]:
    """Which reductions a model with this config takes, and where its preset sets them."""
    try:
        family, text = find_preset(config)
    except ValueError as error:
        return [Finding("model", config.model_type, f"refused: {error}", ok=False)]
    named = Finding("model", config.model_type, f"supported, as {family.title}")
    try:
        preset = FastMMoEConfig.preset(config)
        at = f"preset: {preset.vision_top_k} per vision token, from layer {preset.reduction_layer} on"
        obstacle = family.expert_obstacle(text) if preset.vision_top_k is None else ""
    except ValueError as error:
        at, obstacle = "", str(error)
    experts = Finding("model", "fewer experts", f"no: {obstacle}" if obstacle else at, ok=not obstacle)
    try:
        layers = FastMMoEConfig.preset(config, retention=0.5).prune_layers
        found, is_ok = f"preset: at layers {', '.join(map(str, layers))}", True
    except PresetTooDeepError as error:
        found, is_ok = f"the preset's layers do not fit; at layers such as {', '.join(map(str, error.fitting))}", True
        if not error.fitting:
            found, is_ok = f"no: {error}", False
    except ValueError as error:
        found, is_ok = f"no: {error}", False
    return [named, experts, Finding("model", "pruning", found, ok=is_ok)]


def _models() -> list[Finding]:
    findings = []
    for row in fastmmoe.families():
        experts = f"fewer experts, by {row.experts_note}" if row.experts else "all experts"
        pruning = "pruned" if row.preset_layers else "not pruned"
        is_refused = not row.experts and not row.preset_layers
        findings.append(Finding("models", row.title, "refused" if is_refused else f"{experts}; {pruning}"))
    return findings
