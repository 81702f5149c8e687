"""Tests of the plugin for lmms-eval: the real code of its task mmmu_val over a parquet of the scenes."""

import importlib.util
import io
from pathlib import Path

import pytest

HAS_LMMS_EVAL = importlib.util.find_spec("lmms_eval") is not None
collect_ignore_glob = [] if HAS_LMMS_EVAL else ["test_*.py"]

TASK = "scenes_mmmu"
YAML = """\
include: {mmmu}
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    validation: {parquet}
tag: []
# the small model knows no such words
lmms_eval_specific_kwargs:
  default:
    prompt_type: format
    multiple_choice_prompt: ""
    open_ended_prompt: ""
"""


@pytest.fixture(scope="session")
def tasks(scenes, tmp_path_factory):
    """A directory for `include_path`."""
    import datasets
    import lmms_eval

    rows = []
    for number, scene in enumerate(scenes):
        png = io.BytesIO()
        scene.open_image().save(png, "PNG")
        rows.append(
            {
                "id": f"validation_Art_{number}",
                "question": f"<image 1>{scene.question}",
                "options": "[]",
                "question_type": "open",
                "answer": scene.answer,
                "image_1": {"bytes": png.getvalue(), "path": None},
            }
        )
    text = dict.fromkeys(("id", "question", "options", "question_type", "answer"), datasets.Value("string"))
    directory = tmp_path_factory.mktemp("tasks")
    parquet = directory / "validation.parquet"
    datasets.Dataset.from_list(rows, datasets.Features(text | {"image_1": datasets.Image()})).to_parquet(parquet)
    mmmu = Path(lmms_eval.__file__).parent / "tasks/mmmu/mmmu_val.yaml"
    (directory / f"{TASK}.yaml").write_text(YAML.format(mmmu=mmmu, task=TASK, parquet=parquet))
    return directory
