"""lmms-eval asks a model, dense and reduced, from Python. Needs `fastmmoe[lmms-eval]`; `fastmmoe eval` does more.

    python examples/harness.py DIR mmmu_val
"""

import sys

from lmms_eval.evaluator import simple_evaluate


def main(model: str, task: str, reduced: str = "retention=0.5", **options) -> dict[str, dict]:
    found = {}
    for name, settings in {"dense": "method=dense", "reduced": reduced}.items():
        result = simple_evaluate("fastmmoe", f"pretrained={model},{settings}", tasks=[task], batch_size=8, **options)
        found[name] = result["results"][task]
    return found


if __name__ == "__main__":
    for name, scores in main(*sys.argv[1:3]).items():
        print(name, scores)
