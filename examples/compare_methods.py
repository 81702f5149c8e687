"""Compare ways of pruning at the same places: right answers and FLOPs, on generated scenes with their answers."""

import fastmmoe
from fastmmoe import FastMMoEConfig, FastVConfig, RandomConfig, SparseVLMConfig, UniformConfig
from fastmmoe.families.chat import build_inputs
from fastmmoe.scenes import exact_match
from fastmmoe.scenes.demo import demo_example, demo_model

model, processor = demo_model()
picture, questions = demo_example()
stages = dict(prune_layers=(1, 2, 3), retention=0.25)
methods = {
    "stock": None,
    "FastMMoE": FastMMoEConfig(**stages),
    "FastMMoE, by redundancy": FastMMoEConfig(**stages, keep_by="redundancy", alpha=0.75),
    "SparseVLM": SparseVLMConfig(layers=(1, 2, 3), keep_ratios=(0.63,) * 3),
    "FastV": FastVConfig(layer=2, retention=0.25),
    "uniform": UniformConfig(**stages),
    "random": RandomConfig(**stages),
}
for name, config in methods.items():
    right, saved = 0, 0.0
    if config is not None:
        fastmmoe.enable(model, config)
    for question in questions:
        inputs = build_inputs(model, processor, [picture], question.text)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        said = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += exact_match(said, question.answer)
        saved = fastmmoe.report(model).flops.saved if config is not None else 0.0
    fastmmoe.disable(model)
    print(f"{name:24} {right:2} of {len(questions)} right, {saved:.0%} of the FLOPs saved")
# one picture says little: `fastmmoe analyze` asks thousands of questions
