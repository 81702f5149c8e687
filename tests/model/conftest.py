"""Which tests the oldest transformers cannot pass: it does not have the model yet, or its stock model is wrong."""

import re

import pytest

from .tiny_families import ABSENT, IS_5_17

# part of a test's id -> what transformers 5.17 does by itself, without FastMMoE
STOCK_5_17 = {
    "test_beam_search": "InternVL's beams of the second sample in a batch are not what its pictures make",
    "static_cache_decodes_as_its_samples_alone[gemma4]": "a static cache gives other logits than a dynamic one",
    "static_cache_decodes_as_its_samples_alone[llama4]": "a static cache raises a TypeError",
    "test_windows_and_chunks_shorter_than_the_prompt[llama4-attention_chunk_size-8-static]": "likewise",
    "test_a_second_turn_with_an_image_prunes_it_too[minimax_m3_vl]": "a second turn gives other logits than the whole",
    "test_enabled_from_a_module_above_or_inside[qwen3_omni_moe_thinker]": "the thinker's model is the text model",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        absent = next((name for name in ABSENT if re.search(rf"(?<![a-z]){name}(?![a-z])", item.nodeid)), None)
        wrong = next((why for part, why in STOCK_5_17.items() if IS_5_17 and part in item.nodeid), None)
        if absent:
            item.add_marker(pytest.mark.skip(reason=f"this transformers has no {absent} as it is supported"))
        elif wrong:
            item.add_marker(pytest.mark.skip(reason=f"transformers 5.17 itself: {wrong}"))
