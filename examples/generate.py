"""Generate, stock and reduced: the package's own small model reads a picture. No GPU, no download."""

import fastmmoe
from fastmmoe.families.chat import build_inputs
from fastmmoe.scenes.demo import demo_example, demo_model

model, processor = demo_model()  # any supported checkpoint: AutoModelForImageTextToText.from_pretrained(...)
picture, questions = demo_example()
config = fastmmoe.FastMMoEConfig(vision_top_k=2, reduction_layer=2, prune_layers=(2, 4), retention=0.5)

for question in questions[:4]:
    inputs = build_inputs(model, processor, [picture], question.text)

    def answer(inputs=inputs) -> str:
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    stock = answer()
    fastmmoe.enable(model, config)
    reduced, report = answer(), fastmmoe.report(model)
    fastmmoe.disable(model)
    print(f"{question.text:24} right: {question.answer:8} stock: {stock:8} reduced: {reduced}")

print(f"tokens per layer: {[tokens for (tokens,) in report.tokens_per_layer]}")
print(f"language model FLOPs saved: {report.flops.saved:.1%}")
