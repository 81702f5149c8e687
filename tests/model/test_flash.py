"""What `fastmmoe doctor` says about flash attention is what transformers does."""

import copy
import json

import pytest
import torch
from transformers import PreTrainedModel, modeling_utils
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX, FLASH_ATTN_KERNEL_FALLBACK

from fastmmoe.families.checkpoint import register_ports
from fastmmoe_cli import flash

from .families import TINY
from .test_cli import refused, succeed
from .tiny_checkpoints import save

INSTALLED = {"flash_attention_2": "installed"}


def has(monkeypatch, *versions, kernels=False):
    """A machine with packages of these versions."""
    for version, needs in FLASH_ATTENTION_COMPATIBILITY_MATRIX.items():
        monkeypatch.setitem(needs, "general_availability_check", lambda version=version: version in versions)
    monkeypatch.setattr(flash, "is_kernels_available", lambda: kernels)


def test_offers(monkeypatch):
    has(monkeypatch, 2)
    assert flash.offered(None) == {} and flash.offered(7) == {}
    assert flash.offered(8) == flash.offered(10) == INSTALLED
    has(monkeypatch, 3, kernels=True)
    found = flash.offered(9)
    assert found["flash_attention_3"] == "installed"
    assert found["flash_attention_2"].startswith(FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"])
    assert "flash_attention_4" in found and "flash_attention_4" not in flash.offered(8)
    has(monkeypatch)
    assert flash.offered(9) == {}


@pytest.mark.parametrize("family", TINY)
def test_transformers_says_the_same_of_every_family(family, monkeypatch):
    """Its own check, with a package of version 2 that is there."""
    register_ports()
    model = TINY[family].model()
    taken = flash.taken(copy.deepcopy(model.config), INSTALLED)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_import_error", lambda *_, **__: None)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *_, **__: None)
    has(monkeypatch, 2)
    try:
        with torch.device("meta"):
            built = type(model)._from_config(
                model.config, attn_implementation="flash_attention_2", dtype=torch.bfloat16
            )
        parts = [part for part in built.modules() if isinstance(part, PreTrainedModel)]
        takes = all(part.config._attn_implementation == "flash_attention_2" for part in parts)
    except ValueError as error:
        assert "does not support Flash Attention 2" in str(error)
        takes = False
    assert taken == (INSTALLED if takes else {})


def test_a_model_with_kernels_of_its_own(monkeypatch):
    config = TINY["internvl+gpt_oss"].model().config
    assert flash.taken(config, {}) == {}
    has(monkeypatch, 2, 3)
    assert flash.taken(config, flash.offered(9)) == {}  # neither is among its own
    has(monkeypatch, 2, 3, kernels=True)
    found = flash.taken(config, flash.offered(9))
    assert "kernels-community/vllm-flash-attn3" in found and "flash_attention_2" not in found


def test_doctor(tmp_path):
    checkpoint = save("internvl_qwen3_moe", tmp_path)
    findings = json.loads(succeed("doctor", "--model", checkpoint, "--json"))["findings"]
    found = {finding["name"]: finding["found"] for finding in findings if finding["group"] == "attention"}
    if not torch.cuda.is_available():
        assert found["flash attention"] == "not available" and "none is available" in found["internvl"]
    assert "internvl" not in {finding["name"] for finding in json.loads(succeed("doctor", "--json"))["findings"]}
    assert "no such directory" in refused("doctor", "--model", "/nowhere")
    (checkpoint / "config.json").write_text("{")
    assert "not a valid JSON" in refused("doctor", "--model", checkpoint)
