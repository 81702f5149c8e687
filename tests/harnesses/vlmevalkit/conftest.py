"""Tests of the launcher for VLMEvalKit: its real OCRBench over a TSV of the scenes, in its own environment."""

import base64
import importlib.util
import io
import os
from pathlib import Path

import pytest

HAS_VLMEVALKIT = importlib.util.find_spec("vlmeval") is not None
collect_ignore_glob = [] if HAS_VLMEVALKIT else ["test_*.py"]

DATASET = "OCRBench_MINI"  # of which VLMEvalKit takes any file there is


@pytest.fixture(scope="session", autouse=True)
def dataset(scenes, tmp_path_factory):
    """VLMEvalKit's data folder, with the scenes as OCRBench has its questions."""
    import pandas

    rows = []
    for number, scene in enumerate(scenes):
        png = io.BytesIO()
        scene.open_image().save(png, "PNG")
        rows.append(
            {
                "index": number,
                "image": base64.b64encode(png.getvalue()).decode(),
                "question": scene.question,
                "answer": repr([scene.answer]),
                "category": "Digit String Recognition",
            }
        )
    folder = tmp_path_factory.mktemp("data")
    pandas.DataFrame(rows).to_csv(folder / f"{DATASET}.tsv", sep="\t", index=False)
    shim = str(Path(__file__).parent / "torchvision_ops")
    patch = pytest.MonkeyPatch()
    patch.setenv("LMUData", str(folder))
    patch.setenv("PYTHONPATH", shim, prepend=os.pathsep)
    patch.setenv("OMP_NUM_THREADS", "1")
    yield folder
    patch.undo()
