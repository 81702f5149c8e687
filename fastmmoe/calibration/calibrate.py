"""The calibration as a whole, in one file that holds every finished step, so that a later run can go on."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import fastmmoe
from fastmmoe import MoDESConfig
from fastmmoe.calibration.frontier import frontier, thresholds
from fastmmoe.calibration.importance import MODALITIES, divergences, importances, moe_layers
from fastmmoe.calibration.samples import Sample, answer_log_probs, divergence, make_samples
from fastmmoe.families import architecture_of, find_text_model
from fastmmoe.families.fingerprint import gates_sha256
from fastmmoe.prefill.installation import plan_in_force
from fastmmoe.report import expert_pairs
from fastmmoe.study.questions import Example
from fastmmoe.study.results import header, write_whole

NOTES = (
    "divergences: per question, modality and layer, KL(dense || without the layer's MoE), summed over the answer's "
    "tokens.",
    "evaluated: share of the pairs of a token and an expert that were skipped over all MoE layers, and KL(dense || "
    "skipping) per token of the answers.",
)


class Calibration:
    """A calibration's file: `config` once it is complete, what it rests on below `calibration`.

    Args:
        path: of the file.
        about: what the steps depend on.
        resume: go on with the steps that are in the file.

    Raises:
        ValueError: the file to go on with holds another calibration's steps, or none.
    """

    def __init__(self, path: Path, about: dict[str, Any], resume: bool = False):
        self.path = path
        self._found: dict[str, Any] = {
            "calibration": header(about, NOTES) | {"divergences": [], "evaluated": []},
        }
        if resume and path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                asked = found["calibration"]["study"]
                _check_steps(found)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: holds no calibration ({type(error).__name__}: {error})") from error
            if asked != self._found["calibration"]["study"]:
                raise ValueError(
                    f"{path}: holds steps of another calibration, of {asked}; expected the same settings, another "
                    "file, or to start anew"
                )
            self._found = found

    @property
    def config(self) -> MoDESConfig | None:
        """The result; None before it is complete."""
        values = self._found.get("config")
        return None if values is None else MoDESConfig.from_dict(values)

    @property
    def chosen(self) -> dict[str, float]:
        """The evaluation of the pair that was chosen."""
        return self._found["calibration"]["chosen"]

    @property
    def divergences(self) -> list[dict[str, dict[int, float]]]:
        return [
            {modality: {int(layer): value for layer, value in layers.items()} for modality, layers in one.items()}
            for one in self._found["calibration"]["divergences"]
        ]

    @property
    def evaluated(self) -> dict[tuple[float, float], dict[str, float]]:
        rows = self._found["calibration"]["evaluated"]
        return {(row["text_threshold"], row["vision_threshold"]): row for row in rows}

    def add(self, step: str, value: dict[str, Any]) -> None:
        """Keep a step: of "divergences" or "evaluated"."""
        self._found["calibration"][step].append(value)
        write_whole(self.path, self._found)

    def finish(self, config: MoDESConfig, chosen: dict[str, float]) -> None:
        self._found["calibration"]["chosen"] = chosen
        result = {"type": type(config).__name__, "config": config.to_dict()}
        self._found = result | {"calibration": self._found["calibration"]}
        write_whole(self.path, self._found)


def _check_steps(found: dict[str, Any]) -> None:
    """Check that a file's steps are some; raises whatever what is wrong with them raises."""
    steps = found["calibration"]
    if len(steps["divergences"]) > steps["study"]["questions"]:
        raise ValueError("divergences of more questions than were asked")
    numbers = [value for one in steps["divergences"] for name in MODALITIES for value in one[name].values()]
    rows = [*steps["evaluated"], *([steps["chosen"]] if "config" in found else [])]
    keys = ("text_threshold", "vision_threshold", "skipped", "divergence")
    for number in (*numbers, *(row[key] for row in rows for key in keys)):
        if not math.isfinite(number):
            raise ValueError(f"{number} is no finite number")


def calibrate(
    model: PreTrainedModel, processor: Any, examples: Sequence[Example], target: float, path: Path, resume: bool = False
) -> Calibration:
    """Find importances and thresholds under which a share of the experts is skipped, with the least harm to answers.

    Args:
        model: a supported model, in evaluation mode; FastMMoE is not enabled on it.
        examples: questions with their right answers.
        target: share of the experts to skip, of those that all tokens of the samples choose in all MoE layers.
        path: the file to write, after every step.
        resume: go on with the steps that are in the file.

    Raises:
        ValueError: an unsupported model, a target out of (0, 1) or of the range that the thresholds reach, or a file
            that holds something else.
    """
    if not 0.0 < target < 1.0:
        raise ValueError(f"target: expected a share of the experts in (0, 1), got {target!r}")
    family, text, _ = find_text_model(model)
    if reason := family.expert_obstacle(text.config):
        raise ValueError(f"model: {family.title}'s tokens cannot take fewer experts: {reason}")
    layers, special = moe_layers(model), tuple(sorted(set(processor.tokenizer.all_special_ids)))
    work = Calibration(path, _about(model, examples, target), resume)
    if work.config is not None:
        return work
    samples = list(make_samples(model, processor, tqdm(examples, "prompts", disable=None, leave=False), special))
    with tqdm(samples, "importance", disable=None, unit="question") as bar:
        for number, sample in enumerate(bar):
            if number >= len(work.divergences):
                work.add("divergences", divergences(model, sample))
    alphas = importances(work.divergences, len(text.layers))
    base = MoDESConfig(text_importance=alphas["text"], vision_importance=alphas["vision"])
    # on the host: a number per word of the vocabulary for each token of every answer
    dense = [answer_log_probs(model, sample).cpu() for sample in samples]
    # text tokens of some families have experts of their own, which are not skipped
    tried = {modality: thresholds(modality) for modality in MODALITIES}
    if family.vision_only:
        tried["text"] = (0.0,)

    def config_of(pair: tuple[float, float]) -> MoDESConfig:
        values = base.to_dict() | dict(text_threshold=pair[0], vision_threshold=pair[1])
        return MoDESConfig.from_dict(values | dict(special_tokens=special if pair[0] else ()))

    with tqdm(total=sum(map(len, tried.values())), desc="thresholds", disable=None, unit="pair") as bar:

        @functools.cache
        def evaluated(pair: tuple[float, float]) -> dict[str, float]:
            row = work.evaluated.get(pair)
            if row is None:
                row = _evaluate(model, samples, dense, config_of(pair), len(layers))
                work.add("evaluated", row)
            bar.update()
            return row

        most = evaluated((tried["text"][-1], tried["vision"][-1]))["skipped"]
        if most < target:
            raise ValueError(f"target: expected at most {most:.3f}, which the largest thresholds skip, got {target}")
        least = evaluated((tried["text"][0], tried["vision"][0]))["skipped"]
        if least > target:
            raise ValueError(f"target: expected at least {least:.3f}, which the least thresholds skip, got {target}")
        edge = frontier(tried["text"], tried["vision"], lambda *pair: evaluated(pair)["skipped"], target)
        chosen = min(map(evaluated, edge), key=lambda row: row["divergence"])
    work.finish(config_of((chosen["text_threshold"], chosen["vision_threshold"])), chosen)
    return work


def _evaluate(
    model: PreTrainedModel, samples: Sequence[Sample], dense: Sequence[torch.Tensor], config: MoDESConfig, layers: int
) -> dict[str, float]:
    """The share of experts that a config skips, and how far the answers move."""
    ran = chosen = tokens = moved = 0.0
    architecture = architecture_of(find_text_model(model)[1].config)
    with fastmmoe.enabled(model, config):
        for sample, want in zip(samples, dense, strict=True):
            got = answer_log_probs(model, sample)
            moved += divergence(want.to(got.device), got)
            tokens += sample.answer
            ran += sum(map(sum, expert_pairs(plan_in_force(model), architecture).values()))
            chosen += layers * architecture.num_experts_per_tok * sample.masks["text"].shape[1]
    return {
        "text_threshold": config.text_threshold,
        "vision_threshold": config.vision_threshold,
        "skipped": 1.0 - ran / chosen,
        "divergence": moved / tokens,
    }


def _about(model: PreTrainedModel, examples: Sequence[Example], target: float) -> dict[str, Any]:
    """What a calibration's steps depend on."""
    text = find_text_model(model)[1]
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.question}\0{example.answer}\0".encode())
        digest.update(example.open_image().tobytes())
    weights = hashlib.sha256(next(text.parameters()).detach().float().cpu().numpy().tobytes())
    return {
        "model": {
            "type": text.config.model_type,
            "layers": len(text.layers),
            "embedding_sha256": weights.hexdigest(),
            "gates_sha256": gates_sha256(model),
        },
        "questions": len(examples),
        "questions_sha256": digest.hexdigest(),
        "target": target,
        "dtype": str(next(text.parameters()).dtype),
    }
