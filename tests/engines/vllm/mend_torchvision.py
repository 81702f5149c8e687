"""Make an installed torchvision importable whose binary part was built for a CUDA torch beside a CPU torch.

    python tests/engines/vllm/mend_torchvision.py

Its Python part, all that processors use, then works; its binary operators are missing as before. Where torchvision is
importable as it is, nothing is done.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

DEFINED = '''
# by fastmmoe's tests: the schemas that the binary part, which does not load, would define
import torch as _torch
if not hasattr(_torch.ops.torchvision, "nms"):
    _library = _torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''


def main() -> None:
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0:
        return
    root = importlib.util.find_spec("torchvision").submodule_search_locations[0]
    registrations = Path(root) / "_meta_registrations.py"
    text = registrations.read_text()
    registrations.write_text(text.replace("\n\n@functools", f"\n{DEFINED}\n@functools", 1))
    subprocess.run([sys.executable, "-c", "import torchvision"], check=True)


if __name__ == "__main__":
    main()
