"""Expects every deviation that is listed and no other; counts what became of the tests, if all of them ran."""

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from provenance import provenance, write_json

from .deviations import DEVIATIONS

OUTCOMES: dict[str, str] = {}  # "class.test" -> passed, failed, skipped or listed
RAN_OURS: set[str] = set()  # those in which FastMMoE ran


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json", type=Path, help="write the counts to this file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for deviation in DEVIATIONS:
            if any(fnmatchcase(_name(item.nodeid), pattern) for pattern in deviation.tests):
                raises = pytest.RaisesExc(Exception, match=deviation.error)
                item.add_marker(pytest.mark.xfail(raises=raises, reason=deviation.why, strict=True))


@pytest.fixture(autouse=True)
def note_what_ran(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    request.node.user_properties.append(("ran_ours", request.instance.ran_ours))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = _name(report.nodeid)
    if report.when == "call" or not report.passed:
        OUTCOMES[name] = "listed" if hasattr(report, "wasxfail") else report.outcome
    if dict(report.user_properties).get("ran_ours"):
        RAN_OURS.add(name)


def pytest_sessionfinish(session: pytest.Session) -> None:
    options, command = session.config.option, session.config.invocation_params.args
    if options.keyword or any("::" in word for word in command) or hasattr(session.config, "workerinput"):
        return
    runs: dict[str, Counter[str]] = defaultdict(Counter)
    for name, outcome in sorted(OUTCOMES.items()):
        run = runs[name.split(".")[0]]
        run[outcome] += 1
        run["passed, and ran FastMMoE"] += outcome == "passed" and name in RAN_OURS
    wrong = list(_wrong(runs))
    print("", *(f"{run}: {dict(counts)}" for run, counts in runs.items()), *wrong, sep="\n")
    if wrong:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    result = {"what": "transformers' own tests of three models, as they are and with FastMMoE"}
    result |= provenance(torch.device("cpu")) | {"command": shlex.join(["python", "-m", "pytest", *command])}
    write_json(result | {"runs": runs}, options.json)


def _wrong(runs: dict[str, Counter[str]]) -> Iterator[str]:
    """What no single test shows."""
    for name, outcome in OUTCOMES.items():
        if outcome == "skipped" and OUTCOMES[re.sub(r"_\w+\.", "_Stock.", name)] != "skipped":
            yield f"{name}: skipped, and not with the stock model"
    for run, counts in runs.items():
        if not run.endswith("_Stock") and not counts["passed, and ran FastMMoE"]:
            yield f"{run}: FastMMoE ran in none of its tests"
    for deviation in DEVIATIONS:
        for pattern in deviation.tests:
            if not any(fnmatchcase(name, pattern) for name in OUTCOMES):
                yield f"deviations.py: no test is called {pattern}"


def _name(nodeid: str) -> str:
    return ".".join(nodeid.split("::")[-2:])
