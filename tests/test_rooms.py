"""The package's rooms: imports run downwards, families and methods are named in their own files, registries are whole.

Every check is a function that lists what is wrong, so that the tests can also see it find what is broken on purpose.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch
from model.families import ABSENT, TINY
from model.methods import PARITY

import fastmmoe
from fastmmoe.families import ARCHITECTURES, FAMILIES, Family, find_preset, find_text_model, plain_name, text_config_of
from fastmmoe.methods import METHODS, FastMMoEConfig, MoDESConfig
from fastmmoe.methods.entry import Place
from fastmmoe.study import methods as study_methods

ROOT = Path(__file__).parents[1]

# from the ground up: a module imports from its own room and from those in front of it
ROOMS = (
    "fastmmoe_kernels",
    "fastmmoe.models",
    "fastmmoe.config",
    "fastmmoe.versions",
    "fastmmoe.families",
    "fastmmoe.methods",
    "fastmmoe.engines",  # they have layers of their own, and no use for those of transformers
    "fastmmoe.prefill",
    "fastmmoe.cost",
    "fastmmoe.enable",
    "fastmmoe.report",
    "fastmmoe.support",
    "fastmmoe",  # the public names; what imports them stands on all of the above
    "fastmmoe.scenes",
    "fastmmoe.study",
    "fastmmoe.calibration",
    "fastmmoe.harnesses",
    "fastmmoe_cli",
    "fastmmoe.cli",
)
# rooms whose modules name one another's types: there, only imports that run may not go in circles
CIRCULAR_TYPES = ("fastmmoe.prefill",)


def read_modules() -> dict[str, str]:
    """Dotted name -> source of every module."""
    found = {}
    for folder in ("fastmmoe_kernels", "fastmmoe", "fastmmoe_cli"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


MODULES = read_modules()


# --- imports ----------------------------------------------------------------------------------------------------------


def room_of(module: str) -> str | None:
    """The room that a module is in; None: in none."""
    inside = [room for room in ROOMS if module == room or (module.startswith(f"{room}.") and room != "fastmmoe")]
    return inside[0] if inside else None


def nodes_of(tree: ast.AST, with_types: bool) -> Iterator[ast.AST]:
    """All nodes, of functions too; those under `if TYPE_CHECKING:` only where they are asked for."""
    yield tree
    is_typing = isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING")
    children = tree.orelse if is_typing and not with_types else ast.iter_child_nodes(tree)
    for child in children:
        yield from nodes_of(child, with_types)


def imports_of(module: str, modules: Mapping[str, str], with_types: bool = True) -> set[str]:
    """The package's modules that a module imports anywhere, or names in a string as `importlib` takes it."""
    named = set()
    for node in nodes_of(ast.parse(modules[module]), with_types):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            named |= {node.value} & set(modules)
    # a name within a module is the module's
    prefixes = ([name.rsplit(".", cut)[0] for cut in range(name.count(".") + 1)] for name in named)
    return {found for names in prefixes if (found := next((name for name in names if name in modules), None))}


def upward_imports(module: str, modules: Mapping[str, str]) -> list[str]:
    """A module's imports from rooms that stand higher, or that it is in no room."""
    if room_of(module) is None:
        return [f"{module} is in no room"]
    above = ROOMS[ROOMS.index(room_of(module)) + 1 :]
    return [f"{module} imports {other}" for other in imports_of(module, modules) if room_of(other) in above]


def circle(room: str, modules: Mapping[str, str], with_types: bool = True) -> str:
    """A circle of imports within a room; "" without one."""
    inside = [module for module in modules if room_of(module) == room]
    graph = {module: (imports_of(module, modules, with_types) & set(inside)) - {module} for module in inside}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


def test_imports_run_downwards():
    assert [wrong for module in MODULES for wrong in upward_imports(module, MODULES)] == []


@pytest.mark.parametrize("room", ROOMS)
def test_imports_of_a_room_do_not_go_in_circles(room):
    assert circle(room, MODULES, with_types=room not in CIRCULAR_TYPES) == ""
    if room in CIRCULAR_TYPES:
        assert circle(room, MODULES), f"{room} has no circle any more: take it out of CIRCULAR_TYPES"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastmmoe_kernels.new", "import fastmmoe.config"),
        ("fastmmoe.models.new", "from fastmmoe.families import FAMILIES"),
        ("fastmmoe.config", "from fastmmoe.methods.method import Pruning"),
        ("fastmmoe.families.new", "def late():\n    from fastmmoe.methods import FastMMoEConfig"),
        ("fastmmoe.methods.new", "if TYPE_CHECKING:\n    from fastmmoe.prefill.plan import Plan"),
        ("fastmmoe.prefill.new", "from fastmmoe import enable"),
        ("fastmmoe.cost.new", "import fastmmoe"),
        ("fastmmoe.enable", "from fastmmoe.report import report"),
        ("fastmmoe.scenes.new", "import importlib\nimportlib.import_module('fastmmoe_cli.app')"),
        ("fastmmoe.study.new", "from fastmmoe_cli import compare"),
        ("fastmmoe.new", ""),
    ],
)
def test_an_upward_import_is_found(module, source):
    assert len(upward_imports(module, MODULES | {module: source})) == 1


def test_a_circle_is_found():
    new = {"fastmmoe.cost.one": "from fastmmoe.cost import two", "fastmmoe.cost.two": "import fastmmoe.cost.three"}
    late = "def late():\n    from fastmmoe.cost.one import x"
    typed = "if TYPE_CHECKING:\n    from fastmmoe.cost.one import x\nelse:\n    x = 1"
    assert circle("fastmmoe.cost", MODULES | new) == ""
    assert "fastmmoe.cost.two" in circle("fastmmoe.cost", MODULES | new | {"fastmmoe.cost.three": late})
    closed = MODULES | new | {"fastmmoe.cost.three": typed}
    assert circle("fastmmoe.cost", closed) and not circle("fastmmoe.cost", closed, with_types=False)


# --- names ------------------------------------------------------------------------------------------------------------


# with these a family's name begins like any other text: it is told by its second word too
ORDINARY = {"diffusion", "dots", "muse", "step", "unlimited"}


def words_of(family: Family) -> set[str]:
    """What a family's names begin with, as patterns: of "internvl3.5-30b-a3b", "internvl"."""
    names = [family.title, family.parent_type, family.text_type, *family.architectures]
    words = set()
    for name in map(plain_name, names if family.preset is None else (*names, family.preset.names)):
        word, following = re.match(r"([a-z]+)[-_. ]?([a-z0-9]*)", name).groups()
        words.add(rf"{word}[-_. ]?{following}" if word in ORDINARY else word)
    return words


def family_pattern(words: set[str]) -> re.Pattern:
    """Finds them where a word begins, of a sentence or of a name in camel case."""
    in_camel_case = (rf"(?<=[a-z]){word[0].upper()}(?i:{word[1:]})" for word in sorted(words))
    return re.compile("|".join((rf"(?<![A-Za-z])(?i:{'|'.join(sorted(words))})", *in_camel_case)))


WORDS = {"modes"}  # methods' names that are, in small letters, ordinary words
# rooms of a method's own, beside its file
METHOD_ROOMS = {MoDESConfig: ("fastmmoe.calibration", "fastmmoe_cli.calibrate")}


def method_pattern(config: type) -> re.Pattern:
    """Finds a method's config, its module, and its name where that is no ordinary word: FastV, but not Random."""
    stem = config.__name__.removesuffix("Config")
    names = [f"(?i:{re.escape(name)})" for name in (config.__name__, config.__module__)]
    if stem.lower() in WORDS:
        names.append(stem)
    elif sum(map(str.isupper, stem)) > 1:
        names.append(f"(?i:{stem})")
    return re.compile(rf"(?<![A-Za-z])({'|'.join(names)})\b")


def may_name(family: Family, module: str) -> bool:
    """Whether it is the family's own file, one that is called after it, the registry, or a port of some model."""
    room, _, file = module.rpartition(".")
    if room == "fastmmoe.families":
        defines_one = " = Family(" in MODULES.get(module, "")
        is_own = defines_one and family in vars(importlib.import_module(module)).values()
        return is_own or any(re.search(rf"(^|_){word}", file) for word in words_of(family))
    if re.fullmatch(r"fastmmoe\.engines\.\w+\.families", room):
        return any(re.search(rf"(^|_){word}", file) for word in words_of(family))
    is_registry = module == "fastmmoe.families" or re.fullmatch(r"fastmmoe\.engines\.\w+\.families", module)
    return bool(is_registry) or room_of(module) == "fastmmoe.models"


def strangers(modules: Mapping[str, str]) -> list[str]:
    """Names of families and methods outside their own files, the registries and the package's public names.

    The kernels are compiled for the shapes of released models, and may say whose.
    """
    wrong = []
    for module, source in modules.items():
        if room_of(module) == "fastmmoe_kernels":
            continue
        allowed = set().union(*(words_of(family) for family in FAMILIES if may_name(family, module)))
        others = [words_of(family) - allowed for family in FAMILIES if not may_name(family, module)]
        patterns = [family_pattern(words) for words in others if words]
        texts = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
        for config in METHODS[1:]:  # the first one's name is the package's
            own = METHOD_ROOMS.get(config, ())
            if module not in (config.__module__, "fastmmoe.methods", "fastmmoe") and not module.startswith(own):
                patterns.append(method_pattern(config))
                # elsewhere an ordinary word like "random" means itself
                is_about_methods = room_of(module) in ("fastmmoe.study", "fastmmoe_cli")
                said = texts & {entry.name for entry in config.study_entries()} if is_about_methods else ()
                wrong += [f"{module} says {name!r}, as the tables do" for name in said]
        for number, line in enumerate(source.splitlines(), 1):
            if any(pattern.search(line) for pattern in patterns):
                wrong.append(f"{module}, line {number}: {line.strip()}")
    return wrong


def test_names_stay_in_their_files():
    assert strangers(MODULES) == []


ENGINES = {"vllm": ("fastmmoe.engines.vllm", "fastmmoe_cli.serve", "fastmmoe_cli.extras")}


def engine_strangers(modules: Mapping[str, str]) -> list[str]:
    """Names of engines outside their own rooms, the command that starts one, and the list of extras."""
    return [
        f"{module} says {engine}"
        for engine, homes in ENGINES.items()
        for module, source in modules.items()
        if re.search(rf"(?i){engine}", source) and not module.startswith(homes)
    ]


def test_engines_are_named_at_home():
    assert engine_strangers(MODULES) == []
    assert engine_strangers({"fastmmoe.methods.new": "# as vLLM has it"}) and not engine_strangers(
        {"fastmmoe.engines.vllm.new": "import vllm"}
    )


def test_words_are_those_of_the_registries():
    assert set().union(*map(words_of, FAMILIES)) >= {"internvl", "qwen", "deepseek"}
    assert not family_pattern({"aria"}).search("a variable of malaria, and VARIANTS")
    assert family_pattern({"aria"}).search("AutoAria") and family_pattern({"aria"}).search("an aria_text model")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastmmoe.study.new", "# as DeepSeek has it"),
        ("fastmmoe.prefill.new", "class ForInternVLModels: pass"),
        ("fastmmoe.families.new", '"""Not for Qwen3."""'),
        ("fastmmoe.families.qwen_new", "other = 'deepseek_v2'"),
        ("fastmmoe_cli.new", "from fastmmoe.families.internvl_random import random_model"),
        ("fastmmoe.methods.new", "# FastV does it otherwise"),
        ("fastmmoe.study.new", "from fastmmoe.methods import RandomConfig"),
        ("fastmmoe.study.new", "from fastmmoe.methods.uniform import x"),
        ("fastmmoe.study.new", "COLOURS = {'random': '0.7'}"),
        ("fastmmoe.engines.some.new", "# as DeepSeek has it"),
        ("fastmmoe.engines.some.families.qwen_new", "# as DeepSeek has it"),
    ],
)
def test_a_name_is_found(module, source):
    assert len(strangers({module: source})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastmmoe.families.internvl_new", "# InternVL with Qwen3"),
        ("fastmmoe.engines.some.families", "InternVL, DeepSeek"),
        ("fastmmoe.engines.some.families.internvl", "# InternVL with Qwen3"),
        ("fastmmoe.models.new", "a = 'deepseek_v3'"),
        ("fastmmoe.study.new", "# a random draw of FastMMoE's, at uniform distances"),
    ],
)
def test_a_name_at_home_is_none(module, source):
    assert strangers({module: source}) == []


# --- registries -------------------------------------------------------------------------------------------------------


def is_parity(module: object) -> bool:
    """Whether a test module compares an enabled model with an oracle, in the way of all of them."""
    return callable(getattr(module, "test_forward_and_generate_equal_the_oracle", None)) and bool(module.CASES)


def gaps_of_family(family: Family) -> list[str]:
    """What a family in the registry lacks."""
    gaps, preset = [], family.preset
    if family.obstacle:
        return [] if preset is None and family.name not in TINY else ["obstacle: and yet it has a preset or a model"]
    if not re.fullmatch(preset.names, plain_name(family.checkpoint)):
        gaps.append("preset: its names do not match the checkpoint's")
    elif find_preset(family.checkpoint)[0].name != family.name:
        gaps.append("preset: the checkpoint's is another family's")
    if not family.architectures:
        gaps.append("architectures: none")
    half = preset.num_experts_per_tok // 2 or None
    pruned = {"prune_layers": preset.prune_layers, "retention": 0.5} if preset.prune_layers else {}
    config = FastMMoEConfig(vision_top_k=half, **pruned)
    for name, architecture in family.architectures.items():
        if ARCHITECTURES.get(name) != architecture or not 0 < fastmmoe.flops(name, 100, 1792, config).saved < 1:
            gaps.append(f"architectures: no FLOPs of {name}")
    tiny = TINY.get(family.name)
    if tiny is None:
        return [*gaps, "tests: no tiny model, see tests/model/families.py"]
    module = importlib.import_module(f"model.{tiny.parity}")
    if not is_parity(module):
        gaps.append(f"tests: {tiny.parity} does not compare models with an oracle")
    model = tiny.model()
    if find_text_model(model)[0].name != family.name:
        gaps.append("tests: the tiny model is another family's")
    kinds = [family.why_not_prune(text_config_of(model), layer) for layer in tiny.prune_layers]
    if any(kinds) or bool(preset.prune_layers) != bool(tiny.prune_layers):
        gaps.append("tests: the tiny model is not pruned where it may be")
    return gaps


def gaps_of_method(config: type) -> list[str]:
    """What a method in the registry lacks."""
    gaps = []
    entries = config.study_entries()
    names = [entry.name for entry in study_methods.entries()]
    if not entries or any(names.count(entry.name) != 1 for entry in entries):
        gaps.append("study: no entry, or one of another's name")
    found = (MoDESConfig(),)
    place = Place((5,), 0.5, {"vision_top_k": 4, "reduction_layer": 2}, 100, FastMMoEConfig(), found)
    configs = [one for entry in entries for one in entry.configs(place)]
    for one in configs:
        counted = fastmmoe.flops(next(iter(ARCHITECTURES)), 100, 100, one)
        if type(one) is not config or not 0 < counted.saved < 1:
            gaps.append(f"study: {one} saves no FLOPs")
    if not configs:
        gaps.append("study: no config at a single layer")
    module = importlib.import_module(f"model.{PARITY[config]}") if config in PARITY else None
    tested = [] if module is None or not is_parity(module) else [case.config for case in module.CASES.values()]
    if config not in {FastMMoEConfig if isinstance(one, dict) else type(one) for one in tested}:
        gaps.append("tests: no parity case, see tests/model/methods.py")
    return gaps


PRESENT = [family for family in FAMILIES if family.name not in ABSENT]


@pytest.mark.parametrize("family", PRESENT, ids=lambda family: family.name)
def test_a_family_is_whole(family):
    assert gaps_of_family(family) == []


@pytest.mark.parametrize(
    "family", [one for one in PRESENT if not one.obstacle and one.preset.prune_layers], ids=lambda family: family.name
)
def test_a_tiny_model_of_a_family_is_pruned(family):
    tiny = TINY[family.name]
    model = tiny.model()
    batch = tiny.batch(model)
    with torch.no_grad(), fastmmoe.enabled(model, FastMMoEConfig(prune_layers=tiny.prune_layers, retention=0.5)):
        model(**batch)
        report = fastmmoe.report(model)
    assert len(report.n_vision) == 2 and all(report.n_vision) and len(set(report.n_text)) == 2
    assert [stage.layer for stage in report.stages] == list(tiny.prune_layers)


def test_families_and_methods_are_told_apart():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert set(TINY) == {family.name for family in PRESENT if not family.obstacle} and set(PARITY) == set(METHODS)


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.__name__)
def test_a_method_is_whole(config):
    assert gaps_of_method(config) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"preset": replace(FAMILIES[0].preset, names="something else")}, "preset"),
        ({"architectures": {}}, "architectures: none"),
        ({"architectures": {"internvl3.5-1b": FAMILIES[0].architectures["internvl3.5-30b-a3b"]}}, "no FLOPs"),
        ({"text_type": "unheard_of"}, "tests: no tiny model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_family_lacks_is_found(change, says):
    assert any(says in gap for gap in gaps_of_family(replace(FAMILIES[0], **change)))


def test_what_a_method_lacks_is_found():
    class Untested(METHODS[-1]):
        pass

    assert any("no parity case" in gap for gap in gaps_of_method(Untested))

    class Unseen(Untested):
        @classmethod
        def study_entries(cls):
            return ()

    assert any("study: no entry" in gap for gap in gaps_of_method(Unseen))
