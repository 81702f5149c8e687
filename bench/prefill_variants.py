"""Ways to run one model: stock transformers in each of its forms, our experts alone, FastMMoE in part and in full."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from memory import Memory, measure_memory
from prefill_model import Size
from transformers import DynamicCache, InternVLForConditionalGeneration
from transformers.utils import is_flash_attn_2_available

import fastmmoe
from fastmmoe import FastMMoEConfig, MoDESConfig, PrefillReport
from fastmmoe.prefill.experts import fastmmoe_experts

OURS = "fastmmoe"
# the official scripts' prune layers, of a model of 48
PRUNE_LAYERS, LAYERS = (5, 8, 12), 48
# of an experts layer's output; what both round to is a tenth of it
ERROR_BOUND = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        method: dense, experts only, prune only, both or skipping.
        attention: transformers' attention implementation.
        experts: transformers' experts implementation, for layers and steps where FastMMoE reduces nothing.
        config: what FastMMoE reduces; None: it is off.
    """

    method: str
    attention: str
    experts: str
    config: FastMMoEConfig | None = None


def available_attentions() -> list[str]:
    return ["sdpa"] + ["flash_attention_2"] * is_flash_attn_2_available()


def default_experts(device: torch.device) -> list[str]:
    """Those that a prefill can be run with: batched_mm copies an expert's weights for every token.

    Eager is a loop over all experts that waits for the device each time.
    """
    return ["grouped_mm"] + ["eager"] * (device.type == "cpu")


def build_variants(size: Size, retention: float, attentions: list[str], experts: list[str]) -> dict[str, Variant]:
    """All of them, under each attention; the first is the stock model that the others are compared with.

    FastMMoE as one call of `enable` leaves the model: where nothing is reduced, stock experts run. What prunes runs
    with our experts there as well, so that "prune only" differs from a dense variant by the pruning only.
    """
    layers = tuple(sorted({max(1, round(size.layers * layer / LAYERS)) for layer in PRUNE_LAYERS}))
    fewer = {"vision_top_k": max(1, size.top_k // 2), "reduction_layer": 2}
    prune = {"prune_layers": layers, "retention": retention}
    stock = experts[0]
    variants = {}
    for attention in attentions:
        found = {f"stock, {name}": Variant("dense", attention, name) for name in experts} | {
            "stock, our experts": Variant("dense", attention, OURS),
            "experts only": Variant("experts only", attention, stock, FastMMoEConfig(**fewer)),
            "prune only": Variant("prune only", attention, stock, FastMMoEConfig(**prune)),
            "prune only, our experts": Variant("prune only", attention, OURS, FastMMoEConfig(**prune)),
            "both": Variant("both", attention, stock, FastMMoEConfig(**fewer, **prune)),
            "both, our experts": Variant("both", attention, OURS, FastMMoEConfig(**fewer, **prune)),
        }
        suffix = "" if attention == attentions[0] else f", {attention}"
        variants |= {name + suffix: variant for name, variant in found.items()}
    return variants


def skipping_variants(
    runner: "Runner", inputs: Inputs, share: float, attentions: list[str], experts: str
) -> dict[str, Variant]:
    """Variants that skip about this share of the experts, in prefill and in decoding.

    All layers matter alike; one threshold, for text and vision, is found by bisection on `inputs`.
    """
    layers = runner.model.config.text_config.num_hidden_layers
    low, high = 0.0, 1.0
    for _ in range(20):
        least = (low + high) / 2
        config = MoDESConfig(
            text_threshold=least, vision_threshold=least, text_importance=(1.0,) * layers,
            vision_importance=(1.0,) * layers,
        )  # fmt: skip
        enough = runner.skipped(Variant("skipping", attentions[0], experts, config), inputs) >= share
        low, high = (low, least) if enough else (least, high)
    found = {attention: Variant("skipping", attention, experts, config) for attention in attentions}
    return {
        f"skip {share:.0%}" + ("" if attention == attentions[0] else f", {attention}"): variant
        for attention, variant in found.items()
    }


class Runner:
    """Runs variants on one model; every run leaves it stock."""

    def __init__(self, model: InternVLForConditionalGeneration) -> None:
        self.model = model
        self._text = model.model.language_model

    @contextmanager
    def _as(self, variant: Variant) -> Iterator[None]:
        self._text.set_attn_implementation(variant.attention)
        self._text.set_experts_implementation(variant.experts)
        if variant.config is not None:
            fastmmoe.enable(self.model, variant.config)
        try:
            yield
        finally:
            fastmmoe.disable(self.model)

    def _wait(self) -> None:
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize(self.model.device)

    def _prefill(self, inputs: Inputs) -> tuple[torch.Tensor, DynamicCache]:
        """The first token [B, 1], and the cache."""
        cache = DynamicCache(config=self._text.config)
        logits = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True), cache

    def _decode(self, variant: Variant, inputs: Inputs, token: torch.Tensor, cache: DynamicCache, steps: int) -> float:
        """Seconds per step. As `generate` does it: with the whole mask, on a GPU with batched_mm for grouped_mm."""
        if variant.experts == "grouped_mm" and self.model.device.type != "cpu":
            self._text.set_experts_implementation("batched_mm")
        length = inputs["input_ids"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, steps), value=1)
        self._wait()
        start = time.perf_counter()
        for step in range(1, steps + 1):
            logits = self.model(
                input_ids=token, attention_mask=mask[:, : length + step], past_key_values=cache, use_cache=True
            ).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
        self._wait()
        return (time.perf_counter() - start) / steps

    def measure(self, variant: Variant, inputs: Inputs, steps: int) -> dict[str, float]:
        """Seconds up to the first token (`ttft`), and per further token (`tpot`)."""
        with self._as(variant):
            self._wait()
            start = time.perf_counter()
            token, cache = self._prefill(inputs)
            self._wait()
            ttft = time.perf_counter() - start
            return {"ttft": ttft, "tpot": self._decode(variant, inputs, token, cache, steps)}

    def measure_one_by_one(self, variant: Variant, samples: list[Inputs]) -> float:
        """Seconds of the samples' prefills, one after the other."""
        with self._as(variant):
            self._wait()
            start = time.perf_counter()
            for inputs in samples:
                self._prefill(inputs)
            self._wait()
            return time.perf_counter() - start

    def inspect(self, variant: Variant, inputs: Inputs) -> tuple[Memory, PrefillReport | None]:
        """A prefill's memory and, of a reduced one, what it did. Warms up, decoding included."""
        with self._as(variant):
            memory, (token, cache) = measure_memory(lambda: self._prefill(inputs), self.model.device)
            report = fastmmoe.report(self.model) if variant.config is not None else None
            self._decode(variant, inputs, token, cache, steps=1)
        return memory, report

    def skipped(self, variant: Variant, inputs: Inputs) -> float:
        """The share of the experts that a prefill skips by need."""
        with self._as(variant):
            self._prefill(inputs)
            return fastmmoe.report(self.model).experts_skipped

    def logits(self, variant: Variant, inputs: Inputs) -> torch.Tensor:
        """The first token's, float32 [B, vocabulary]."""
        with self._as(variant):
            return self.model(**inputs, logits_to_keep=1).logits[:, -1].float()

    def experts_error(self, variant: Variant, inputs: Inputs) -> float:
        """The largest relative error over the layers of our experts' output, on what each layer's own get."""
        errors = []

        def compare(experts: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
            ours = fastmmoe_experts(experts, *args).float()
            errors.append((ours - output.float()).norm() / output.float().norm())

        found = [module for name, module in self._text.named_modules() if name.endswith(".experts")]
        handles = [module.register_forward_hook(compare) for module in found]
        try:
            self.logits(variant, inputs)
        finally:
            for handle in handles:
                handle.remove()
        # of a tensor: NaN stays
        return torch.stack(errors).max().item()


def check_parity(runner: Runner, inputs: Inputs, attention: str, experts: str) -> dict[str, float]:
    """Nothing is timed on a model that FastMMoE would break.

    Our experts are compared layer by layer, on what the stock model's get. Logits would not do: 16-bit experts round
    differently, tokens near a tie then choose another expert, which random weights carry on through all layers. So the
    distance of the logits is told, not judged.

    Raises:
        SystemExit: settings that reduce nothing change more than the device or transformers' own two implementations
            do, or our experts' outputs are not those of the stock ones.
    """

    def logits(experts: str, config: FastMMoEConfig | None = None) -> torch.Tensor:
        return runner.logits(Variant("parity", attention, experts, config), inputs)

    stock = logits(experts)

    def error(other: torch.Tensor) -> float:
        return ((other - stock).norm() / stock.norm()).item()

    # 0 unless some kernel of the device gives other bits each time
    noise = error(logits(experts))
    between = error(logits("grouped_mm" if experts == "eager" else "eager"))
    idle = error(logits(experts, FastMMoEConfig()))
    if not (idle == 0 or idle <= max(2 * noise, between)):
        raise SystemExit(f"parity: with settings that reduce nothing, the logits differ from stock by {idle:.1e}")
    bound = ERROR_BOUND[runner.model.dtype]
    ours = runner.experts_error(Variant("parity", attention, experts), inputs)
    if not ours <= bound:
        raise SystemExit(f"parity: our experts' outputs differ from the stock ones by {ours:.1e}, expected <= {bound}")
    return {"stock_again": noise, "nothing_reduced": idle, "stock_eager_or_grouped_mm": between,
            "our_experts_logits": error(logits(OURS)), "our_experts": ours, "bound": bound}  # fmt: skip
