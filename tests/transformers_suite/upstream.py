"""transformers' own tests of a model, as its source distribution has them: `make test-transformers` unpacks them.

The distribution holds the files at the top of its `tests/` alone. Two that these import are below, and lacking; what
stands for them here has no tests.
"""

import sys
from pathlib import Path
from types import ModuleType

import transformers

HERE = Path(__file__).parent
UNPACKED = HERE.parents[1] / "build" / "transformers_suite"
LACKING = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}

pinned = (HERE / "sdist.txt").read_text().split()[0]
if pinned != f"transformers=={transformers.__version__}":
    raise RuntimeError(f"sdist.txt: expected the tests of transformers {transformers.__version__}, got {pinned}")
if not (UNPACKED / "transformers_tests").is_dir():
    raise RuntimeError(f"{UNPACKED}: transformers' tests are not there; run make test-transformers")

for name, mixin in LACKING.items():
    module = ModuleType(f"transformers_tests.{name}")
    setattr(module, mixin, type(mixin, (), {}))
    sys.modules[module.__name__] = module
sys.path.insert(0, str(UNPACKED))

from transformers_tests import test_modeling_common  # noqa: E402

ModelTesterMixin = test_modeling_common.ModelTesterMixin
