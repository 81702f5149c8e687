"""`torch.compile(fullgraph=True)` of an enabled decoder layer: no graph break, and the same figures."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.families import find_text_model
from fastmmoe.methods import FastVConfig, SparseVLMConfig

from .methods import skipping
from .tiny import tiny_batch, tiny_internvl
from .tiny_deepseek import tiny_deepseek_batch, tiny_deepseek_vl2

BOTH = FastMMoEConfig(vision_top_k=2, reduction_layer=1, prune_layers=(1, 3), retention=0.4, merge_ratio=0.3)
LAYERS = {"fewer experts and pruning": 1, "behind a prune layer": 2, "last": 5}


@pytest.fixture(autouse=True)
def poison_empty():
    """In place of the one for all tests: Dynamo traces torch's own functions, and remembers which those are."""
    torch._dynamo.trace_rules.clear_lru_cache()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    # every layer is the same code with other hooks and other lengths, and compiles anew
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_layer_compiles_without_a_graph_break(layer):
    model = tiny_internvl()
    fastmmoe.enable(model, BOTH)
    batches = [tiny_batch(model, (1, 2), seed=seed) for seed in range(2)]
    with torch.no_grad():
        want = [model(**batch).logits for batch in batches]
        counter = CompileCounterWithBackend("aot_eager")
        model.model.language_model.layers[layer].compile(fullgraph=True, backend=counter)
        compiled = []
        for batch, logits in zip(batches, want, strict=True):
            torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-4, atol=1e-4)
            compiled.append(counter.frame_count)
    # the second batch has other words and pictures of the same sizes
    assert compiled[0] > 0 and compiled[1] == compiled[0]
    assert len(fastmmoe.report(model).stages) == 2


@pytest.mark.parametrize(
    "config",
    [
        None,
        FastMMoEConfig(vision_top_k=2, reduction_layer=1),
        FastMMoEConfig(prune_layers=(1,), retention=0.4),
        FastMMoEConfig(vision_top_k=2, reduction_layer=1, prune_layers=(1,), retention=0.4),
        FastMMoEConfig(expert_budget=4, reduction_layer=1),
        skipping,
    ],
    ids=["stock", "experts", "prune", "both", "budget", "skipping"],
)
def test_layers_of_a_kind_share_one_graph(config):
    """Under a cache not even stock layers do: each finds its keys by its number."""
    graphs = []
    for layers in (5, 9):
        torch._dynamo.reset()
        model = tiny_internvl(num_hidden_layers=layers)
        batch = tiny_batch(model, (1, 2))
        if config is not None:
            fastmmoe.enable(model, config(layers) if callable(config) else config)
        counter = CompileCounterWithBackend("eager")
        with torch.no_grad():
            want = model(**batch, use_cache=False).logits
            for layer in model.model.language_model.layers:
                layer.compile(fullgraph=True, backend=counter)
            torch.testing.assert_close(model(**batch, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] <= 5


def test_decoding_with_compiled_layers():
    model = tiny_internvl()
    batch = tiny_batch(model, (1, 2))
    fastmmoe.enable(model, BOTH)
    options = dict(do_sample=False, max_new_tokens=3)
    want = model.generate(**batch, **options)
    for layer in (1, 4):  # a prune layer, and one behind
        model.model.language_model.layers[layer].compile(fullgraph=True, backend="eager")
    assert torch.equal(model.generate(**batch, **options), want)
    fastmmoe.disable(model)
    assert torch.equal(model.generate(**batch, **options), tiny_internvl().generate(**batch, **options))


@pytest.mark.parametrize(
    "config", [FastVConfig(2, 0.4), SparseVLMConfig((1, 3), counts=(12, 5))], ids=["fastv", "sparse"]
)
def test_layers_that_a_baseline_prunes_behind(config):
    model = tiny_internvl()
    batch = tiny_batch(model, (1, 2))
    fastmmoe.enable(model, config)
    with torch.no_grad():
        want = model(**batch).logits
        for layer in (1, 2):
            model.model.language_model.layers[layer].compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(**batch).logits, want, rtol=1e-4, atol=1e-4)


def test_deepseek_layers():
    model = tiny_deepseek_vl2("base")
    batch = tiny_deepseek_batch()
    fastmmoe.enable(model, BOTH)
    with torch.no_grad():
        want = model(**batch).logits
        for layer in (1, 4):
            find_text_model(model)[1].layers[layer].compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(**batch).logits, want, rtol=1e-4, atol=1e-4)
