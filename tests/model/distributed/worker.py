"""What every process of several does with a model that they hold: `torchrun -m model.distributed.worker FOLDER`.

What came out of it goes to `FOLDER/FAMILY-SPLIT-RANK.pt`, what was refused as its text.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

import fastmmoe
from fastmmoe import FastMMoEConfig, FastVConfig, RandomConfig, SparseVLMConfig, UniformConfig
from fastmmoe.config import ReductionConfig
from fastmmoe.prefill.patch import patches_on

from ..methods import skipping
from ..tiny_families import FAMILIES, randomise
from .samples import batch_of_rank

PROCESSES, LAYERS = 2, 5
STAGES = dict(prune_layers=(1, 3), retention=0.5)
EXPERTS = dict(vision_top_k=2, reduction_layer=1)
CASES: dict[str, ReductionConfig | None] = {
    "stock": None,
    "experts": FastMMoEConfig(**EXPERTS),
    "stages": FastMMoEConfig(**STAGES),
    "both": FastMMoEConfig(**STAGES, **EXPERTS),
    "redundancy": FastMMoEConfig(**STAGES, **EXPERTS, keep_by="redundancy", merge_ratio=0.2),
    "routing": FastMMoEConfig(**STAGES, strategy="routing_similarity"),
    "fastv": FastVConfig(layer=1, retention=0.4),
    "fastv received": FastVConfig(layer=1, retention=0.4, query="mean"),
    "sparsevlm": SparseVLMConfig(layers=(1, 3), keep_ratios=(0.7, 0.5), recycle_ratio=0.5, tokens_per_cluster=2),
    "sparsevlm, adaptive": SparseVLMConfig(layers=(1, 3), rank_scale=1.0),
    "uniform": UniformConfig(**STAGES),
    "random": RandomConfig(**STAGES, seed=3),
    "modes": skipping(LAYERS, **STAGES),
    "budget": FastMMoEConfig(**EXPERTS, expert_budget=3),
}
# one of these per place where experts are run
FEW = ("stock", "experts", "both", "budget")
WHOLE_EXPERTS = {
    f"model.language_model.layers.*.mlp.experts{part}": "replicate" for part in ("", ".gate_up_proj", ".down_proj")
}


class Split(NamedTuple):
    """How processes share a model.

    Attributes:
        options: of DistributedConfig.
        experts: transformers' experts_implementation.
        cases: names of `CASES`.
    """

    options: dict[str, Any]
    experts: str = "grouped_mm"
    cases: tuple[str, ...] = FEW

    @property
    def shares_batch(self) -> bool:
        """Whether both processes are given the same prompts."""
        return "fsdp_size" not in self.options


SPLITS = {
    "tp": Split(dict(tp_size=2), cases=tuple(CASES)),
    "tp, eager": Split(dict(tp_size=2), "eager", ("both",)),
    "tp, fastmmoe": Split(dict(tp_size=2), "fastmmoe"),
    "tp of attention": Split(dict(tp_size=2, tp_plan=WHOLE_EXPERTS), cases=tuple(CASES)),
    "fsdp": Split(dict(fsdp_size=2), cases=("both", "budget")),
    "fsdp, ep": Split(dict(fsdp_size=2, ep_size=2)),
} | {
    f"ep, {implementation}, {experts}": Split(
        dict(tp_size=2, ep_size=2, ep_implementation=implementation),
        experts,
        (tuple(CASES) if implementation == "auto" else FEW) if experts == "grouped_mm" else ("both",),
    )
    for implementation in ("auto", "all_reduce", "all_to_all")
    for experts in ("grouped_mm", "fastmmoe", *(("eager", "batched_mm") if implementation == "auto" else ()))
}


def is_held(family: str, split: str) -> bool:
    """Whether transformers itself can split that model so: it transposes Qwen3-VL-MoE's experts behind the split."""
    return not (family == "qwen3_vl_moe" and split.startswith("tp") and SPLITS[split].options == dict(tp_size=2))


def save_tiny(family: str, folder: Path) -> None:
    """A checkpoint whose experts two processes can share, as it lies on the hub."""
    config = FAMILIES[family]()[0].config
    # grouped_mm wants rows of multiples of 16 bytes in each half
    config.text_config.moe_intermediate_size, config.text_config.num_hidden_layers = 24, LAYERS
    model = AutoModelForImageTextToText.from_config(config)
    randomise(model, 0)
    if family == "qwen3_vl_moe":
        for layer in model.model.language_model.layers:
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(layer.mlp.experts, name)
                weight.data = weight.data.mT.contiguous()
    model.save_pretrained(folder)


def load(folder: Path, experts: str = "grouped_mm", **options: Any) -> nn.Module:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options).eval()
    # transformers lets some models alone be loaded with an implementation
    model.model.language_model.layers[0].mlp.experts.config._experts_implementation = experts
    return model


def results(model: nn.Module, inputs: dict[str, torch.Tensor], cases: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What a model makes of prompts under each case, and which of its tokens survive."""
    found = {}
    for name in cases:
        if CASES[name] is not None:
            fastmmoe.enable(model, CASES[name])
        with torch.no_grad():
            logits = model(**inputs).logits
            report = fastmmoe.report(model) if CASES[name] is not None and "pixel_values" in inputs else None
            answers = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        found[name] = {"logits": logits, "answers": answers}
        if report is not None:
            found[name] |= {
                "tokens": report.tokens_per_layer,
                "fates": [fate.tolist() for stage in report.stages for fate in stage.fate],
                "pairs": report.expert_pairs,
            }
        fastmmoe.disable(model)
    return found


def refusals(folder: Path) -> dict[str, str]:
    """What is said of models that were split by hand: part, mesh dimension -> message."""
    found = {}
    for part in ("experts", "attention"):
        for dimension in ("tp", "rows", None):
            model = load(folder)
            layer = model.model.language_model.layers[3]
            module, name = (layer.mlp.experts, "down_proj") if part == "experts" else (layer.self_attn.q_proj, "weight")
            mesh = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=None if dimension is None else (dimension,))
            setattr(module, name, nn.Parameter(distribute_tensor(getattr(module, name), mesh, [Shard(0)])))
            try:
                fastmmoe.enable(model, CASES["experts" if part == "experts" else "stages"])
                found[f"{part}, {dimension}"] = "nothing"
                fastmmoe.disable(model)
            except ValueError as error:
                found[f"{part}, {dimension}"] = str(error)
            assert not patches_left(model)
    return found


def switched(folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Another experts implementation than that which was there when the split model was enabled."""
    model = load(folder, "fastmmoe", distributed_config=DistributedConfig(tp_size=PROCESSES))
    fastmmoe.enable(model, CASES["both"])
    found = {}
    with torch.no_grad():
        for name in ("fastmmoe", "eager", "batched_mm", "grouped_mm", "fastmmoe"):
            model.model.language_model.layers[0].mlp.experts.config._experts_implementation = name
            found[name] = model(**inputs).logits
    return found


def gate_alone(folder: Path) -> str:
    """What is said where FSDP gathers a gate for itself alone."""
    plan = {"model.language_model.layers.*.mlp.gate": "free_full_weight"}
    model = load(folder, distributed_config=DistributedConfig(fsdp_size=PROCESSES, fsdp_plan=plan))
    fastmmoe.enable(model, CASES["experts"])
    fastmmoe.disable(model)
    try:
        fastmmoe.enable(model, CASES["stages"])
    except ValueError as error:
        return str(error)
    return "nothing"


def patches_left(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if patches_on(module)]


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    for family in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        for name, split in SPLITS.items():
            if not is_held(family, name):
                continue
            try:
                distributed = DistributedConfig(**split.options)
                model = load(folder / family, split.experts, distributed_config=distributed)
                assert any(isinstance(weight, DTensor) for weight in model.parameters()), "nothing is split"
                inputs = batch_of_rank(family, 0 if split.shares_batch else rank)
                found = results(model, inputs, split.cases)
            except Exception:
                found = traceback.format_exc()
            torch.save(found, folder / f"{family}-{name}-{rank}.pt")
    plain = "internvl_qwen3_moe"
    said = refusals(folder / plain) | {"gate": gate_alone(folder / plain)}
    torch.save(said, folder / f"refusals-{rank}.pt")
    torch.save(switched(folder / plain, batch_of_rank(plain, 0)), folder / f"switched-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
