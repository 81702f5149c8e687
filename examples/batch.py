"""A batch of samples with one picture, two and none, padded and packed: each is pruned by its own prompt."""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import fastmmoe

IMAGE, TOKENS = 90, 16  # the placeholder's id, and how many of them a picture takes

# random weights: the shapes are the point
torch.manual_seed(0)
text = dict(
    model_type="qwen3_moe", vocab_size=96, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=32,
)  # fmt: skip
vision = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4,
)  # fmt: skip
config = AutoConfig.for_model(
    "internvl", text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=TOKENS
)
model = AutoModelForImageTextToText.from_config(config).eval()

samples = [
    [5, 6, *[IMAGE] * TOKENS, 7, 8, 9],
    [5, *[IMAGE] * TOKENS, 10, *[IMAGE] * TOKENS, 11, 12],
    [13, 14, 15],
]
width = max(map(len, samples))
ids = torch.tensor([[0] * (width - len(sample)) + sample for sample in samples])
inputs = {
    "input_ids": ids,
    "attention_mask": (ids != 0).long(),
    "pixel_values": torch.randn(3, 3, 32, 32),  # of all samples, in order
}

fastmmoe.enable(model, fastmmoe.FastMMoEConfig(vision_top_k=2, prune_layers=(1, 3), retention=0.5))
with torch.no_grad():
    padded = model(**inputs).logits
    report = fastmmoe.report(model)
    packed = model(**fastmmoe.pack_batch(inputs)).logits

print("vision tokens:", report.n_vision)
for stage in report.stages:
    print(f"layer {stage.layer}: {stage.entering} -> kept {stage.kept}, merged {stage.merged}")
ends = torch.tensor([len(sample) for sample in samples]).cumsum(0) - 1
difference = (padded[:, -1] - packed[0, ends]).abs().max()
print(f"last logits, padded against packed: {difference:.1e} apart")
