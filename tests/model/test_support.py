"""What `fastmmoe.families` and the documentation say of every family, against the registry and tiny models."""

from pathlib import Path

import pytest

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.families import FAMILIES, find_text_model, register, text_config_of
from fastmmoe.prefill.expert_form import expert_form
from fastmmoe.support import table

from .families import TINY

SUPPORTED = Path(__file__).parents[2] / "docs/supported.md"
ROWS = {f"{row.parent_type}+{row.text_type}": row for row in fastmmoe.families()}


def test_the_documentation_has_the_table_of_the_registry():
    assert table() in SUPPORTED.read_text(), "docs/supported.md: put in what fastmmoe.support.table() returns"


def test_a_row_for_each_family():
    assert list(ROWS) == [family.name for family in FAMILIES]


@pytest.mark.parametrize("name", TINY)
def test_a_row_tells_what_its_model_does(name):
    row, model = ROWS[name], TINY[name].model()
    family, text, _ = find_text_model(model)
    moe = [number for number, layer in enumerate(text.layers) if family.is_moe(layer)]
    sound = [number for number in moe if not family.why_not_prune(text_config_of(model), number)]
    assert bool(sound) == bool(row.preset_layers) == (not row.pruning_note) == bool(row.prunable_kinds)
    half = FastMMoEConfig(vision_top_k=1, reduction_layer=0)
    if not row.experts:
        with pytest.raises(ValueError, match=row.experts_note):
            fastmmoe.enable(model, half)
    else:
        try:
            expert_form(family.experts_of(text.layers[moe[-1]]), family.plain_experts)
            path = "kernel"
        except ValueError:
            path = "the model's own, a row per token and expert"
        assert row.experts_note == path
        fastmmoe.enable(model, half)
    if not sound:
        with pytest.raises(ValueError, match="cannot prune"):
            fastmmoe.enable(model, FastMMoEConfig(prune_layers=(moe[-1],), retention=0.5))
    else:
        fastmmoe.enable(model, FastMMoEConfig(prune_layers=tuple(sound[:2]), retention=0.5))


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.obstacle], ids=lambda family: family.name)
def test_a_refused_family_says_why(family):
    row = ROWS[family.name]
    assert not row.experts and not row.preset_layers and row.experts_note == row.pruning_note == family.obstacle


@pytest.mark.parametrize(
    "family, error, says", [("internvl", TypeError, "expected a Family, got str"), (FAMILIES[0], ValueError, "already")]
)
def test_what_cannot_be_registered(family, error, says):
    before = fastmmoe.families()
    with pytest.raises(error, match=says):
        register(family)
    assert fastmmoe.families() == before
