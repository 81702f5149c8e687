"""The study: its parts, the order they come in, and the processes that share the work."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from fastmmoe.families import find_text_model
from fastmmoe.families.chat import check_question, placeholders_of
from fastmmoe.families.checkpoint import load_model, read_config
from fastmmoe.families.fingerprint import gates_sha256
from fastmmoe.families.processors import load_processor
from fastmmoe.prefill import experts
from fastmmoe.scenes import CHECKPOINT
from fastmmoe.study import methods as grids
from fastmmoe.study.accuracy import answers_of, evaluate
from fastmmoe.study.magnitude import magnitude_stability
from fastmmoe.study.methods import Method, Setting, key_of
from fastmmoe.study.prediction import predicted_ratios
from fastmmoe.study.prompts import Batch, encode, make_batches, typical
from fastmmoe.study.questions import Example, read_questions, scene_questions
from fastmmoe.study.results import PartFile, header, read_parts
from fastmmoe.study.routing import routing_similarity
from fastmmoe.study.timing import prefill_times

# in this order: settings are chosen from the ablations, and times are taken when nothing else runs
PARTS = {
    "methods": "every method at every placement and retention, with all experts and with fewer",
    "heatmap": "fewer experts alone, by first layer and number of experts (the paper's Figs. 3 and 4)",
    "routing": "adjacent-token routing similarity per layer (Fig. 1)",
    "magnitude": "magnitude stability per layer (Fig. 5)",
    "ablations": "window, alpha, merge ratio, strategy and merge method, on dev",
    "chosen": "FastMMoE with the best of the ablations' settings",
    "budget": "fewer distinct experts: accuracy by number B and first layer, one prompt per forward",
    "timing": "prefill times",
}
CHOOSING = ("ablations", "chosen")  # settings are chosen in one, for the other
OF_LAYERS = {"routing": routing_similarity, "magnitude": magnitude_stability}
OBSERVED = 500  # prompts that the analyses of layers look at

# (split, methods) -> their rows, as they come
Evaluate = Callable[[str, list[Method]], Iterator[dict[str, Any]]]

NOTES = (
    "One checkpoint, of one training seed: standard errors cover the questions, not the training.",
    "standard_error is binomial; differences of methods are paired, on the same questions.",
    "flops: the language model's prefill per prompt; flops_ratio: of the dense model's.",
    "time_ratio_predicted: device -> floor of the prefill's time by fastmmoe.prefill_time, of the dense model's; one "
    "prompt per forward, the split's of median length, with the pairs of a token and an expert that ran. Calculated, "
    "not measured; a small model takes its launches' time there.",
    "budget: one prompt per forward, as all prompts of a forward share a budget; elsewhere batches.",
    "ablations are on dev; the setting with the best mean over layers and retentions there is `chosen`.",
)


@dataclass(frozen=True)
class Settings:
    """What a study asks.

    Attributes:
        model: checkpoint directory or hub id; None: the package's own, trained on its scenes.
        data, dev_data: JSONL files of questions (see `read_questions`); None: the package's scenes.
        split: which scenes the results are about; settings are chosen on "dev".
        n, dev_n: questions of `split` and of "dev".
        seed: which scenes.
        batch: prompts per forward.
        max_new_tokens: length of the answers.
        device, dtype: to run on and in; dtype "auto" is float32 on a CPU and the checkpoint's elsewhere.
        threads: CPU threads of each process.
        rounds, timing_batch: timed prefills of each method, and prompts per prefill.
        calibration: what `fastmmoe calibrate` wrote for the model; None: methods that need it are left out.
    """

    model: str | None = None
    data: Path | None = None
    dev_data: Path | None = None
    split: str = "test"
    n: int = 2000
    dev_n: int = 1000
    seed: int = 0
    batch: int = 64
    max_new_tokens: int = 8
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 1
    rounds: int = 9
    timing_batch: int = 16
    calibration: Path | None = None

    @property
    def checkpoint(self) -> str:
        return self.model or str(CHECKPOINT)

    @property
    def default_parts(self) -> tuple[str, ...]:
        """All, or those that need no dev questions where there are none."""
        return tuple(part for part in PARTS if self.has_dev or part not in CHOOSING)

    @property
    def has_dev(self) -> bool:
        return self.data is None or self.dev_data is not None

    def examples(self, split: str) -> list[Example]:
        """The questions of "dev", or else those the results are about.

        Raises:
            ValueError: a file that cannot be used.
        """
        is_dev = split == "dev"
        n, data = (self.dev_n, self.dev_data) if is_dev else (self.n, self.data)
        if self.data is None:
            return scene_questions(split, n, self.seed)
        return read_questions(data, n)


class Session:
    """A model and its questions, in one process.

    Raises: on construction, whatever loading the checkpoint's config and processor raises.
    """

    def __init__(self, settings: Settings):
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.processor = load_processor(settings.checkpoint)
        self._questions: dict[str, tuple[list[Example], list[Batch]]] = {}

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """Loaded when it is asked for.

        Raises: whatever loading the checkpoint raises; ValueError for an unsupported model.
        """
        settings = self.settings
        device = torch.device(settings.device)
        dtype = "float32" if settings.dtype == "auto" and device.type == "cpu" else settings.dtype
        model = load_model(settings.checkpoint, dtype, device)
        # the same kernels for all methods, the dense model included
        find_text_model(model)[1].set_experts_implementation(experts.NAME)
        return model

    @functools.cached_property
    def setting(self) -> Setting:
        path = self.settings.calibration
        calibrated = () if path is None else (grids.read_calibration(path, gates_sha256(self.model)),)
        counts = {n for batch in self.questions(self.settings.split)[1] for n in batch.layout.n_vision}
        return Setting.of(self.model, counts.pop() if len(counts) == 1 else None, calibrated)

    def questions(self, split: str) -> tuple[list[Example], list[Batch]]:
        """A split's questions and their prompts."""
        if split not in self._questions:
            examples = self.settings.examples(split)
            is_quiet = multiprocessing.parent_process() is not None or None
            shown = tqdm(examples, f"{split} prompts", disable=is_quiet, leave=False)
            prompts = encode(self.model, self.processor, shown)
            self._questions[split] = examples, make_batches(prompts, self.settings.batch)
        return self._questions[split]

    def evaluate(self, split: str, method: Method) -> dict[str, Any]:
        """A row of results: the questions of a split under a method."""
        examples, batches = self.questions(split)
        if method.expert_budget is not None:
            batches = [one for batch in batches for one in batch.alone()]
        max_new_tokens = self.settings.max_new_tokens
        row = evaluate(self.model, self.processor, examples, batches, method, max_new_tokens=max_new_tokens)
        return row | {"time_ratio_predicted": self.predict(split, method), "split": split}

    def predict(self, split: str, method: Method) -> dict[str, float]:
        """Calculated time under a method, of the dense model's, by device: of the split's prompt of median length."""
        return predicted_ratios(self.model, typical(self.questions(split)[1]), method.config)

    def observed(self) -> list[Batch]:
        """The batches that the analyses of layers look at."""
        batches = self.questions(self.settings.split)[1]
        # from all over the list: it is sorted by length
        step = max(1, sum(len(batch.numbers) for batch in batches) // OBSERVED)
        return batches[::step]

    def describe_model(self) -> dict[str, Any]:
        """What tells the model from another; its gates' digest stands for all weights."""
        return {
            # another machine's folders say nothing
            "name": Path(self.settings.model).name if self.settings.model else "fastmmoe/scenes/checkpoint",
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "layers": self.setting.layers,
            "top_k": self.setting.top_k,
            "placements": self.setting.placements,
            "gates_sha256": gates_sha256(self.model),
        }


@functools.cache
def session_of(settings: Settings) -> Session:
    """The process's session: a worker loads once."""
    return Session(settings)


class Study:
    """Parts of the study, each left as `<part>.json` and `<part>.csv` in a directory.

    Args:
        parts: some of `PARTS`; they run in its order.
        resume: keep the rows that are in `out`, and add what is missing.

    Raises: on construction, before any work: ValueError for unknown parts, for questions or pictures that are missing
        or cannot be read, for rows of another study in `out`, for files there that are no study's, for an unsupported
        model; whatever loading the checkpoint raises.
    """

    def __init__(self, settings: Settings, out: Path, parts: Sequence[str], *, resume: bool = False):
        if unknown := [part for part in parts if part not in PARTS]:
            raise ValueError(f"parts: unknown {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
        if not parts:
            raise ValueError(f"parts: expected some of {', '.join(PARTS)}, got none")
        splits = {settings.split} | ({"dev"} & {split_of(part, settings) for part in parts})
        if "dev" in splits and not settings.has_dev:
            needing = [part for part in parts if part in CHOOSING] or ["split dev"]
            raise ValueError(f"dev_data: none given, and {', '.join(needing)} needs questions to choose settings by")
        examples = [] if settings.data is None else [one for split in splits for one in settings.examples(split)]
        # those that the tables at the end are made of
        read_parts(out, [part for part in PARTS if resume or part not in parts])
        if "chosen" in parts and "ablations" not in parts and not read_parts(out, ["ablations"]):
            raise ValueError(f"parts: chosen needs the ablations, and {out} has no complete ones")
        self.settings, self.out = settings, out
        self.session = session_of(settings)
        if examples:
            placeholders = placeholders_of(read_config(settings.checkpoint), self.session.processor)
            for example in examples:
                check_question(example.where, example.question, placeholders)
            for split in splits:  # opens every picture
                self.session.questions(split)
        asked = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(settings).items()
            if name not in ("model", "threads")
        }
        digests = {
            f"{name}_sha256": hashlib.sha256(path.read_bytes()).hexdigest()
            for name in ("data", "dev_data", "calibration")
            if (path := getattr(settings, name)) is not None
        }
        head = header({"model": self.session.describe_model(), **asked, **digests}, NOTES)
        out.mkdir(parents=True, exist_ok=True)
        reason = self.session.setting.no_budget
        why_empty = {"budget": {"why_empty": reason}} if reason else {}
        self.files = {
            part: PartFile(out, part, head | why_empty.get(part, {}), resume) for part in PARTS if part in parts
        }
        for part, file in self.files.items():
            if part not in (*OF_LAYERS, "timing"):
                _check_rows(file)

    def run(self, workers: int = 1, begin: Callable[[str], None] = lambda part: None) -> None:
        """Run all parts; `workers` processes share the methods of a part.

        Args:
            begin: called with the name of each part that is to do.
        """
        with _evaluator(self.settings, workers) as evaluate_all:
            for part, file in self.files.items():
                if file.is_complete:
                    continue
                begin(part)
                if part == "timing":
                    file.finish(self._times())
                elif part in OF_LAYERS:
                    model, batches = self.session.model, self.session.observed()
                    file.finish(OF_LAYERS[part](model, tqdm(batches, part, disable=None, unit="batch")))
                else:
                    self._fill(file, part, evaluate_all)

    def _grid(self, part: str) -> list[Method]:
        setting = self.session.setting
        if part == "methods":
            return grids.main_grid(setting)
        if part == "heatmap":
            return [grids.dense(), *grids.heatmap_grid(setting)]
        if part == "ablations":
            return [grids.dense(), *grids.ablation_grid(setting)]
        if part == "budget":
            return [grids.dense(), *grids.budget_grid(setting)] if setting.budgets else []
        changes = choose(setting, read_parts(self.out, ["ablations"])["ablations"]["rows"])
        return grids.chosen_grid(setting, grids.CHOSEN, changes)

    def _fill(self, file: PartFile, part: str, evaluate_all: Evaluate) -> None:
        grid = self._grid(part)
        done = {key_of(row) for row in file.rows}
        missing = [method for method in grid if method.key not in done]
        with tqdm(total=len(grid), initial=len(grid) - len(missing), desc=part, disable=None, unit="method") as bar:
            for row in evaluate_all(split_of(part, self.settings), missing):
                file.add(row)
                bar.update()
        by_key = {key_of(row): row for row in file.rows}
        file.finish(by_key[method.key] for method in grid)

    def _times(self) -> list[dict[str, Any]]:
        """Prefill times of the main grid, over one batch of prompts of like length."""
        settings, model = self.settings, self.session.model
        methods = grids.main_grid(self.session.setting)
        batches = self.session.questions(settings.split)[1]
        batch = batches[len(batches) // 2].first(settings.timing_batch)
        with tqdm(total=len(methods) * (settings.rounds + 1), desc="timing", disable=None, unit="prefill") as bar:
            rows = prefill_times(model, batch, methods, settings.rounds, progress=bar.update)
        return [
            row | {"time_ratio_predicted": self.session.predict(settings.split, method)}
            for row, method in zip(rows, methods, strict=True)
        ]


def _check_rows(file: PartFile) -> None:
    """Refuse rows to go on with that are no methods' results."""
    for number, row in enumerate(file.rows):
        try:
            key_of(row), answers_of(row), float(row["accuracy"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file.path}: row {number} is damaged ({type(error).__name__}: {error})") from error


def split_of(part: str, settings: Settings) -> str:
    """Whose questions a part asks."""
    return "dev" if part == "ablations" else settings.split


def choose(setting: Setting, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The changes to the preset that answer best, in the mean of the rows; of equals the one that changes least."""
    accuracies: dict[tuple, list[float]] = {}
    for row in rows:
        if row["config"] is not None:
            changes = tuple(grids.changes_of(setting, row["config"]).items())
            accuracies.setdefault(changes, []).append(row["accuracy"])
    best = max(accuracies, key=lambda changes: (fmean(accuracies[changes]), -len(changes)))
    return dict(best)


@contextmanager
def _evaluator(settings: Settings, workers: int) -> Iterator[Evaluate]:
    """Evaluate in this process, or in several."""
    if workers == 1:
        yield lambda split, methods: (_evaluate(settings, split, method) for method in methods)
        return
    # spawned: a fork would copy the threads' locks
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:

        def evaluate_all(split: str, methods: list[Method]) -> Iterator[dict[str, Any]]:
            futures = [pool.submit(_evaluate, settings, split, method) for method in methods]
            return (future.result() for future in as_completed(futures))

        try:
            yield evaluate_all
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _evaluate(settings: Settings, split: str, method: Method) -> dict[str, Any]:
    return session_of(settings).evaluate(split, method)
