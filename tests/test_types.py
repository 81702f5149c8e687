"""A type checker knows every type of the public surface, and reads a user's program without a word."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastmmoe
import fastmmoe_kernels

CHECKER = "basedpyright"
PACKAGES = (fastmmoe, fastmmoe_kernels)
# rooms that no user calls into
INNER = {"engines", "harnesses", "models", "prefill", "study"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The packages as an environment has them: a type checker does not see through an editable installation."""
    directory = tmp_path_factory.mktemp("site")
    for package in PACKAGES:
        (directory / package.__name__).symlink_to(Path(package.__file__).parent)
    return directory


def check(site, *arguments):
    bin = Path(sys.executable).parent
    environment = os.environ | {"PYTHONPATH": str(site), "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"}
    # in a directory of its own, for a configuration beside it counts
    done = subprocess.run(
        [bin / CHECKER, "--outputjson", *arguments], cwd=site, env=environment, capture_output=True, text=True
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("package", [package.__name__ for package in PACKAGES])
def test_every_public_type_is_known(site, package):
    found = check(site, "--verifytypes", package, "--ignoreexternal")["typeCompleteness"]
    public = [symbol for symbol in found["symbols"] if INNER.isdisjoint(symbol["name"].split(".")[1:2])]
    names = {symbol["name"] for symbol in public}
    assert names >= {f"{package}.{name}" for name in sys.modules[package].__all__}
    unclear = {
        symbol["name"]: [diagnostic["message"] for diagnostic in symbol["diagnostics"]]
        for symbol in public
        if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]
    }
    assert not unclear, json.dumps(unclear, indent=1)


def test_a_users_program(site):
    program, text = site / "program.py", (Path(__file__).parent / "typed" / "program.py").read_text()
    assert [name for name in fastmmoe.__all__ if not re.search(rf"\b{name}\b", text)] == []
    program.write_text(text)
    found = check(site, "--level", "error", str(program))
    said = [f"{row['range']['start']['line'] + 1}: {row['message']}" for row in found["generalDiagnostics"]]
    assert found["summary"]["filesAnalyzed"] == 1 and not said, "\n".join(said)


def test_what_a_users_program_gets_wrong_is_said(site):
    """Else the test above would say nothing."""
    program = site / "wrong.py"
    program.write_text("import fastmmoe\nfastmmoe.enable(3, fastmmoe.FastMMoEConfig())\nfastmmoe.report(3).nosuch\n")
    assert len(check(site, "--level", "error", str(program))["generalDiagnostics"]) >= 2
