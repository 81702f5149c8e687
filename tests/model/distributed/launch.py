"""Start several processes."""

import os
import subprocess
import sys
from pathlib import Path

from .worker import PROCESSES

ROOT = Path(__file__).parents[3]


def launch(module: str, folder: Path) -> None:
    """Run a module in `PROCESSES` processes, which find one another, over gloo."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES))
    ran = subprocess.run(
        (*command, "-m", module, str(folder)),
        capture_output=True, text=True, timeout=900,
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
