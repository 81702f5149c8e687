"""MoDES (CVPR 2026, arXiv 2511.15690): a token skips the experts that matter little to it, in prefill and decoding."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from fastmmoe.config import ExpertChoice, checked, int_from, number_from, tuple_of
from fastmmoe.methods.entry import Entry, Place
from fastmmoe.methods.fastmmoe import FastMMoEConfig


@dataclass(frozen=True)
class MoDESConfig(FastMMoEConfig):
    """MoDES's skipping of experts, alone or together with all that `FastMMoEConfig` does.

    A token's weight of a chosen expert (as the model normalises it, in front of the scaling factor) times its layer's
    importance: where that is below the threshold, the expert is skipped. The other weights stay as they are, and a
    token may lose all of its routed experts. Text and vision tokens have importances and thresholds of their own;
    special tokens are neither and keep all experts. It holds in every forward, decoding included. How many experts are
    skipped depends on the data: `fastmmoe.flops` counts none, `fastmmoe.report` those of the last prefill.

    `fastmmoe calibrate` finds the importances and thresholds for a model, and `from_file` reads them.

    Args:
        text_threshold, vision_threshold: tau, at least 0; at 0 nothing is skipped.
        text_importance, vision_importance: alpha, one number >= 0 per decoder layer, that of layers without experts is
            not read; a layer's tokens skip all experts where it is 0.
        special_tokens: ids of tokens that are neither text nor vision: the tokenizer's special ones. A prompt that
            comes as embeddings has them where an embedding is one of theirs.
        others: as in `FastMMoEConfig`. Weights that count are those after `vision_top_k`. With a `text_threshold`,
            `min_vision_tokens` is refused: text skips experts in every forward.
    """

    text_threshold: float = checked(0.0, number_from(0.0))
    vision_threshold: float = checked(0.0, number_from(0.0))
    text_importance: tuple[float, ...] = checked((), tuple_of(number_from(0.0)))
    vision_importance: tuple[float, ...] = checked((), tuple_of(number_from(0.0)))
    special_tokens: tuple[int, ...] = checked((), tuple_of(int_from(0)))

    def __post_init__(self) -> None:
        super().__post_init__()
        for modality in ("text", "vision"):
            threshold, importance = self._of(modality)
            if threshold and not importance:
                raise ValueError(
                    f"{modality}_importance: expected a number per layer with {modality}_threshold={threshold}, got ()"
                )
        if self.text_threshold and self.min_vision_tokens:
            raise ValueError(
                f"min_vision_tokens={self.min_vision_tokens}: expected 0 with text_threshold={self.text_threshold}: "
                "text skips experts in every forward, however few vision tokens a prompt has"
            )
        if self.special_tokens and not self.text_threshold:
            raise ValueError("special_tokens: expected none with text_threshold=0.0, where no token of text is skipped")

    @property
    def reduces_experts(self) -> bool:
        return super().reduces_experts or self.vision_threshold > 0 or self.reduces_text

    @property
    def reduces_text(self) -> bool:
        return self.text_threshold > 0

    def expert_choice(self, layer: int, top_k: int) -> ExpertChoice | None:
        choice = super().expert_choice(layer, top_k) or ExpertChoice(top_k)
        if self.text_threshold or self.vision_threshold:
            return replace(choice, skip_below=(self._least("text", layer), self._least("vision", layer)))
        return choice if choice != ExpertChoice(top_k) else None

    def check_model(self, num_hidden_layers: int, num_experts_per_tok: int) -> None:
        """As `ReductionConfig.check_model`; also refuses importances of another number of layers."""
        for modality in ("text", "vision"):
            count = len(self._of(modality)[1])
            if count not in (0, num_hidden_layers):
                raise ValueError(
                    f"{modality}_importance: expected one number for each of the model's {num_hidden_layers} layers, "
                    f"got {count}"
                )
        super().check_model(num_hidden_layers, num_experts_per_tok)

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> Self:
        """Read what `fastmmoe calibrate` wrote. Whether it was for the model that it is enabled on is not checked.

        Args:
            path: the JSON file.
            overrides: any field, in place of the file's value: `prune_layers` and `retention` to prune as well.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no calibration.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            kind, values = found["type"], found["config"]
            if kind != cls.__name__:
                raise ValueError(f"path: {path} holds a {kind}, expected a {cls.__name__}")
            return cls.from_dict(values | overrides)
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"path: {path} holds no calibration of `fastmmoe calibrate`: {error!r}") from error

    @classmethod
    def study_entries(cls) -> tuple[Entry, ...]:
        """One entry, where it is calibrated for the model: the first calibration, pruned as FastMMoE does."""

        def configs(place: Place) -> tuple[MoDESConfig, ...]:
            found = [config for config in place.calibrated if isinstance(config, cls)][:1]
            where = {"prune_layers": place.layers, "retention": place.retention, **place.experts}
            settings = {name: getattr(place.preset, name) for name in ("merge_ratio", "window", "alpha", "strategy")}
            return tuple(replace(config, **settings, **where) for config in found)

        return (Entry("MoDES", "tab:cyan", configs),)

    def _of(self, modality: str) -> tuple[float, tuple[float, ...]]:
        return getattr(self, f"{modality}_threshold"), getattr(self, f"{modality}_importance")

    def _least(self, modality: str, layer: int) -> float:
        """The weight below which a layer's tokens skip an expert."""
        threshold, importance = self._of(modality)
        if not threshold:
            return 0.0
        return threshold / importance[layer] if importance[layer] else float("inf")
