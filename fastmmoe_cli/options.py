"""The options that several commands share, and what their values stand for: whatever stands for nothing is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastmmoe_cli.console import fail, importing, reason, refusing
from fastmmoe_cli.presets import preset_for

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedConfig

    from fastmmoe import FastMMoEConfig
    from fastmmoe.config import ReductionConfig


def complete_from(values: Sequence[str]) -> Callable[[str], list[str]]:
    """What a shell offers behind an option, of `values`."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


Sizes = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A checkpoint directory, or a released model; an unknown name lists them."),
]
Text = Annotated[int, typer.Option(min=0, help="Text tokens of the prompt.")]
Vision = Annotated[int, typer.Option(min=0, help="Vision tokens of the prompt.")]
ReductionLayer = Annotated[int, typer.Option(help="First layer that uses --vision-top-k.")]
IMAGES = typer.Option("--image", help="Image file; repeat for several images.")
VIDEOS = typer.Option(
    "--video",
    help="Video: animated GIF, WebP or PNG, a directory of 2 frames a second, or any file that PyAV reads; repeat for "
    "several.",
)
RETENTION = "Share of the vision tokens left after the last prune layer."
Retention = Annotated[float, typer.Option(help=RETENTION)]
HalfRetention = Annotated[float | None, typer.Option(help=RETENTION, show_default="0.5")]
Strategy = Annotated[
    Literal["hybrid", "routing_similarity", "dynamic_attention"] | None,
    typer.Option(help="How redundancy is found.", show_default="the preset's"),
]
KeepBy = Annotated[
    Literal["importance", "redundancy"] | None,
    typer.Option(help="What ranks tokens: importance is the paper's, redundancy ours.", show_default="importance"),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="JSON file of settings, as config.to_dict() gives them, in place of the options."),
]
NewTokens = Annotated[int, typer.Option(min=1, max=65_536, help="Length of the answers.")]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", autocompletion=complete_from(("auto", "cpu", "cuda")))
]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")]
Report = Annotated[Path | None, typer.Option(help="HTML file for a page with all of it, which needs nothing else.")]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


def vision_top_k_option(default: str):
    """`--vision-top-k`; `default` says what a command takes without it."""
    return typer.Option(help="Experts per vision token.", show_default=default)


def prune_layers_option(default: str):
    """`--prune-layers`, for `read_layers`; `default` says what a command takes without it."""
    return typer.Option("--prune-layers", help="Layers that prune, such as 5,8,12.", show_default=default)


def check_pruning(retention: float | None, options: Mapping[str, object]) -> None:
    """Check that some tokens go where options say how."""
    if retention == 1.0 and (given := [name for name, value in options.items() if value]):
        fail(f"{given[0]}: without effect at --retention 1.0, which prunes nothing")


def check_retention(value: float | None) -> None:
    """Check that it is a share, in front of what takes long to import."""
    if value is not None and not 0.0 < value <= 1.0:
        fail(f"--retention: expected a number in (0, 1], got {value}")


def check_prompt(option: str, text: str | None) -> None:
    """Check that something is asked, likewise."""
    if text is not None and not text.strip():
        fail(f"{option}: expected a question, got {text!r}")


def read_layers(text: str | None) -> tuple[int, ...] | None:
    """Layers with commas between; None: not given."""
    if text is None:
        return None
    try:
        return tuple(int(layer) for layer in text.split(",")) if text.strip() else ()
    except ValueError:
        fail(f"--prune-layers {text}: expected layer numbers such as 5,8,12")


def read_reduction(
    model: str, vision_top_k: int | None, reduction_layer: int, prune_layers: str | None, retention: float
) -> tuple[PreTrainedConfig | str, FastMMoEConfig]:
    """What the calculating commands are asked about: a model's config, or its name, and what is reduced.

    Raises:
        OSError, ValueError, TypeError: no config in that directory, or settings that are none.
    """
    check_model(model)
    check_retention(retention)
    layers = read_layers(prune_layers)
    check_pruning(retention, {"--prune-layers": layers})
    with importing():
        from fastmmoe import FastMMoEConfig
        from fastmmoe.families.checkpoint import read_config

    sizes = read_config(model) if Path(model).is_dir() else model
    if layers is None and retention != 1.0:
        layers = _preset_layers(sizes, retention)
    config = FastMMoEConfig(
        vision_top_k=vision_top_k,
        reduction_layer=reduction_layer,
        prune_layers=layers or (),
        retention=retention,
    )
    return sizes, config


def _preset_layers(sizes: PreTrainedConfig | str, retention: float) -> tuple[int, ...]:
    """Where the preset of what is named prunes.

    Raises:
        ValueError: nothing is called so, or it has no preset.
    """
    from fastmmoe import FastMMoEConfig
    from fastmmoe.cost.tokens import count_tokens
    from fastmmoe.families import find_preset

    count_tokens(sizes, 1, 0, FastMMoEConfig())  # where nothing is called so, this says what is
    try:
        find_preset(sizes)
    except ValueError:
        said = "--prune-layers: expected the layers to prune at: no preset says them for this model"
        raise ValueError(said) from None
    return preset_for(sizes, retention=retention).prune_layers


def check_config(path: Path | None, others: Mapping[str, object]) -> None:
    """Check that there is a file of settings, and no option beside it that it would say."""
    if path is None:
        return
    if given := [name for name, value in others.items() if value is not None]:
        option = f"--{given[0].replace('_', '-')}"
        fail(f"--config {path}: says all settings, expected no {option} beside it")
    if not path.is_file():
        fail(f"--config {path}: No such file")
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        fail(f"--config {path}: holds no config, and no JSON: {reason(error)}")


def read_config_option(path: Path) -> ReductionConfig:
    """The settings of that file."""
    from fastmmoe.methods.files import read_config_file

    with refusing(ValueError, before="--config "):
        return read_config_file(path)[0]


def read_device(name: str) -> torch.device:
    """The device of that name, which this machine has; "auto" is a GPU where there is one."""
    with importing():
        import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = {"cpu": 1}
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        counts[accelerator.type] = torch.accelerator.device_count()
    try:
        device = torch.device(name)
    except RuntimeError:  # it lists dozens
        fail(f"--device {name}: no name of a device, expected one of auto, {', '.join(counts)}")
    count = counts.get(device.type, 0)
    if (device.index or 0) >= count:
        fail(f"--device {name}: this machine has {count} such devices, expected one of auto, {', '.join(counts)}")
    return device


def check_model(model: str, option: str = "") -> None:
    """Check that what can only be a directory is one; a hub id is for the hub to know."""
    if not Path(model).is_dir() and (model.count("/") > 1 or model.startswith((".", "/", "~")) or model.endswith("/")):
        fail(f"{option}{model}: no such directory")


def check_images(paths: Sequence[Path]) -> None:
    """Check that there are such files, in front of what takes long to import."""
    for path in paths:
        if not path.exists():
            fail(f"--image {path}: No such file or directory")
        if path.is_dir():
            fail(f"--image {path}: Is a directory")


def open_images(paths: Sequence[Path]) -> list[Image]:
    """The pictures, RGB and upright."""
    check_images(paths)
    from fastmmoe.families.images import open_image

    with refusing(ValueError, before="--image "):
        return [open_image(path) for path in paths]
