"""A family of one's own, without touching the package: InternVL's vision tower above an OLMoE text model."""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import fastmmoe
from fastmmoe.families import register
from fastmmoe.families.family import Family
from fastmmoe.families.gates import softmax_gate

IMAGE, TOKENS = 90, 16

# where its parts are need not be said: they are where most models have them. How its gate scores must be:
register(
    Family(
        title="InternVL with OLMoE",
        parent_type="internvl",
        text_type="olmoe",
        routing_options=softmax_gate,  # a softmax over all experts, then the best, renormalised where its gate does so
        gate_class="OlmoeTopKRouter",  # another class is refused: another version may have another gate
    )
)

torch.manual_seed(0)
text = dict(
    model_type="olmoe", vocab_size=96, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, num_experts=8, num_experts_per_tok=4, intermediate_size=32, eos_token_id=2,
)  # fmt: skip
vision = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4,
)  # fmt: skip
config = AutoConfig.for_model(
    "internvl", text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=TOKENS
)
model = AutoModelForImageTextToText.from_config(config).eval()
inputs = {
    "input_ids": torch.tensor([[5, 6, *[IMAGE] * TOKENS, 7, 8, 9]]),
    "pixel_values": torch.randn(1, 3, 32, 32),
}

with torch.no_grad():
    stock = model(**inputs).logits
    # all of its experts through our routing and our kernel: the stock model's logits
    with fastmmoe.enabled(model, fastmmoe.FastMMoEConfig(vision_top_k=4, reduction_layer=0)):
        torch.testing.assert_close(model(**inputs).logits, stock, rtol=1e-4, atol=1e-4)
    settings = dict(vision_top_k=2, reduction_layer=1, prune_layers=(2, 4), retention=0.5)
    fastmmoe.enable(model, fastmmoe.FastMMoEConfig(**settings))
    reduced = model(**inputs).logits
report = fastmmoe.report(model)
print("tokens per layer:", [tokens for (tokens,) in report.tokens_per_layer])
print(f"FLOPs saved: {report.flops.saved:.1%}; last logits moved by {(reduced - stock)[0, -1].abs().max():.2f}")
# then prove it: the parity tests of your family, as in docs/develop/family.md
