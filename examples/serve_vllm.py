"""Both reductions inside stock vLLM, offline; `fastmmoe serve MODEL` starts its server. Needs `fastmmoe[vllm]`.

    python examples/serve_vllm.py Qwen/Qwen3-VL-30B-A3B-Instruct picture.jpg "What is it?"
"""

import sys

from PIL import Image
from vllm import LLM, SamplingParams


def main(model: str, picture: str, question: str, settings: dict | None = None, **options) -> str:
    # any fields of FastMMoEConfig; without this option every model stays vLLM's own
    reduction = {"fastmmoe": settings or {"retention": 0.5}}
    engine = LLM(model, additional_config=reduction, limit_mm_per_prompt={"image": 1}, **options)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image_pil", "image_pil": Image.open(picture).convert("RGB")},
                {"type": "text", "text": question},
            ],
        }
    ]
    (output,) = engine.chat(messages, SamplingParams(temperature=0.0, max_tokens=64))
    return output.outputs[0].text.strip()


if __name__ == "__main__":
    print(main(*sys.argv[1:4]))
