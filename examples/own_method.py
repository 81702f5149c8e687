"""A method of one's own, without touching the package: keep the vision tokens nearest to the middle of the sequence."""

from dataclasses import dataclass

import torch

import fastmmoe
from fastmmoe.families.chat import build_inputs
from fastmmoe.methods.blind import BlindConfig
from fastmmoe.scenes.demo import demo_example, demo_model
from fastmmoe_kernels import VisionLayout


@dataclass(frozen=True)
class MiddleConfig(BlindConfig):
    """Prunes by place alone; `BlindConfig` brings the counts, the checks and the pruning."""

    def importance(self, stage: int, layout: VisionLayout) -> torch.Tensor:
        """float32 [B, n]: what ranks the vision tokens; the best stay."""
        rank = (layout.vision_mask.cumsum(1) - 1).float()  # [B, n], of each among its sample's vision tokens
        middle = layout.vision_mask.sum(1, keepdim=True) / 2  # [B, 1]
        return torch.where(layout.vision_mask, -(rank - middle).abs(), 0.0)


model, processor = demo_model()
picture, questions = demo_example()
inputs = build_inputs(model, processor, [picture], questions[0].text)

with fastmmoe.enabled(model, MiddleConfig(prune_layers=(4,), retention=0.3, vision_top_k=2)):
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    (fate,) = fastmmoe.report(model).stages[0].fate
print(questions[0].text, "->", processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print("".join("#" if one == 0 else "." for one in fate))
