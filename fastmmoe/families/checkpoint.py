"""Read a checkpoint's config and weights, and refuse what is broken or does not fit together.

No file of a checkpoint is run: no code that comes with it, and no pickle.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from fastmmoe.families import FAMILIES

SHOWN = 3  # names of weights in a message
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def register_ports() -> None:
    """Make the models that this package brings known to transformers' Auto classes."""
    for family in FAMILIES:
        if family.port:
            importlib.import_module(family.port)


@contextmanager
def reading(checkpoint: str) -> Iterator[None]:
    """Turn what broken files make transformers stumble over into OSError, ImportError or ValueError with its name."""
    try:
        yield
    except (OSError, ImportError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{checkpoint}: brings code of its own, which is not run, expected a model that transformers has; "
                "to trust it, load it yourself and call fastmmoe.enable"
            ) from error
        if checkpoint in str(error):
            raise
        kind = next(kind for kind in (OSError, ImportError, ValueError) if isinstance(error, kind))
        raise kind(f"{checkpoint}: {error}") from error
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{checkpoint}: cannot be read ({said})") from error


def read_config(checkpoint: str) -> PreTrainedConfig:
    """The config of a checkpoint, a directory or a hub id.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: a config that is none, or of a model that is not known or brings its own code.
    """
    register_ports()
    with reading(checkpoint):
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)


def load_model(
    checkpoint: str, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The model of a checkpoint, a directory or a hub id, in evaluation mode; all of its weights come from there.

    Raises:
        OSError: no such checkpoint, no safetensors in it, or a file of weights that is not whole.
        ValueError: weights of other shapes than the config's, missing or left-over ones; a model that is not known.
    """
    config = read_config(checkpoint)
    with reading(checkpoint):
        _check_weights(checkpoint, config)
        try:
            model, found = AutoModelForImageTextToText.from_pretrained(
                checkpoint,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
        except SafetensorError as error:
            file = _broken_file(checkpoint) or checkpoint
            raise OSError(f"{file}: not a whole file of weights ({error})") from error
        shapes = [f"{name}: {tuple(there)}, not {tuple(here)}" for name, there, here in found["mismatched_keys"]]
        kinds = {"of other shapes": shapes, "missing": found["missing_keys"], "left over": found["unexpected_keys"]}
        wrong = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
        if wrong:
            raise ValueError(f"{checkpoint}: the weights are not those of its config: {', '.join(wrong)}")
        return model.to(device).eval()


def _check_weights(checkpoint: str, config: PreTrainedConfig) -> None:
    """Check that no weights are pickled, whoever names the files: reading those may run what is in them."""
    name, directory = getattr(config, "transformers_weights", None) or SAFE_WEIGHTS_INDEX_NAME, Path(checkpoint)
    names = [name]
    if name.endswith(".index.json"):
        index = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
        names = json.loads(Path(index).read_bytes())["weight_map"].values() if index else []
    if not names and not any(directory.glob("*.safetensors")):
        names = [file.name for kind in PICKLED for file in directory.glob(kind)]
    if pickled := sorted(file for file in names if not file.endswith(".safetensors")):
        raise OSError(
            f"{checkpoint}: its weights are pickled ({pickled[0]}), expected safetensors; to trust them, load the "
            "model with transformers and write it with save_pretrained"
        )


def _some(names: set[str] | list[str]) -> str:
    return ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _broken_file(directory: str) -> Path | None:
    """The first file of weights in a directory that is not whole."""
    for file in sorted(Path(directory).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            return file
    return None
