"""What share of the dense model's time a prefill would take on devices that are not here, by calculation."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

import fastmmoe
from fastmmoe.config import ReductionConfig
from fastmmoe.cost.devices import DEVICES
from fastmmoe.methods import FastMMoEConfig
from fastmmoe.study.answers import prefill, reduced
from fastmmoe.study.prompts import Batch

SHOWN = next(iter(DEVICES))  # the one that tables and plots have room for


@torch.inference_mode()
def predicted_ratios(model: PreTrainedModel, prompt: Batch, config: ReductionConfig | None) -> dict[str, float]:
    """`fastmmoe.prefill_time` of one prompt under a config, of the dense model's, on every device that it knows.

    The prompt is prefilled once: how many experts tokens skip by need is known only then. An expert budget is that of
    a forward with this prompt alone.

    Args:
        prompt: a batch of one.
        config: what is reduced; None: nothing.

    Returns:
        Device -> ratio of calculated floors, not of measured times.
    """
    with reduced(model, config or FastMMoEConfig()):
        prefill(model, prompt.to(model.device))
        report = fastmmoe.report(model)
    times = {device: report.time(device) for device in DEVICES}
    return {device: time.reduced / time.dense for device, time in times.items()}
