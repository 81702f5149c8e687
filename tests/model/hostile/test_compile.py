"""`torch.compile` of the whole model: never the stock model in silence, whenever it was compiled and by which call."""

import pytest
import torch

import fastmmoe

from ..tiny import tiny_internvl
from ..tiny_deepseek import tiny_deepseek_vl2
from .common import (
    batch_of,
    close,
    config_of,
    enabled_logits,
    fresh,
    layers_of,
    logits_of,
    stock_logits,
    vision_of,
)

# tracing takes seconds per layer: two of them, the first one a prune layer whose vision tokens take fewer experts
SHALLOW = {
    "both": dict(prune_layers=(0,), reduction_layer=0),
    "prune": dict(prune_layers=(0,)),
    "experts": dict(reduction_layer=0),
}
CLOSE = dict(atol=1e-4, rtol=1e-4)


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


def shallow(family):
    if family == "internvl":
        model = tiny_internvl(num_hidden_layers=2)
    else:
        model = tiny_deepseek_vl2("base", num_hidden_layers=2, first_k_dense_replace=0)
    tower = model.model.vision_tower
    tower.forward = torch.compiler.disable(tower.forward)  # nothing of ours is in there
    return model


def compiled(model, how, **options):
    """What to call for a compiled forward."""
    if how == "torch.compile(model)":
        return torch.compile(model, **options)
    if how == "model.forward":
        model.forward = torch.compile(model.forward, **options)
    else:
        model.compile(**options)
    return model


def two_tokens(model, batch):
    """Logits of a prefill and of the decode step behind it."""
    options = dict(do_sample=False, max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    return torch.stack(model.generate(**batch, **options).logits)


CASES = {
    "model-run-on-the-stock-model-before": (
        "torch.compile(model)",
        "run before",
        logits_of,
        "internvl",
        "both",
        "eager",
    ),
    "model-after": ("torch.compile(model)", "after", logits_of, "deepseek", "experts", "aot_eager"),
    "forward-after-generate": ("model.forward", "after", two_tokens, "deepseek", "prune", "eager"),
    "in-place-before-generate": ("model.compile()", "before", two_tokens, "internvl", "both", "eager"),
}


@pytest.mark.parametrize(("how", "when", "run", "family", "name", "backend"), CASES.values(), ids=CASES)
def test_a_compiled_model_is_enabled_and_disabled_as_the_model_is(how, when, run, family, name, backend):
    model, batch = shallow(family), batch_of(family)
    config = config_of(name, **SHALLOW[name])
    stock = run(model, batch)
    with fastmmoe.enabled(model, config):
        want = run(model, batch)
    assert (want - stock).abs().max() > 0.1
    if when != "after":
        call = compiled(model, how, backend=backend)
    if when == "run before":
        torch.testing.assert_close(run(call, batch), stock, **CLOSE)
    fastmmoe.enable(model, config)
    if when == "after":
        # a prefill for the report to be wrong about
        logits_of(model, batch_of(family, (2,)))
        call = compiled(model, how, backend=backend)
    torch.testing.assert_close(run(call, batch), want, **CLOSE)
    report = fastmmoe.report(model)
    assert report.n_vision == tuple(vision_of(batch).sum(1).tolist())
    assert len(report.stages) == (name != "experts")
    fastmmoe.disable(model)
    if run is logits_of:  # the other would take as long again
        torch.testing.assert_close(run(call, batch), stock, **CLOSE)


def test_fullgraph_is_not_the_stock_model_in_silence():
    model, batch = shallow("internvl"), batch_of("internvl")
    fastmmoe.enable(model, config_of("both", **SHALLOW["both"]))
    want = logits_of(model, batch)
    call = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):  # the second time by what the first one left
        try:
            got = logits_of(call, batch)
        except (RuntimeError, AssertionError):  # Dynamo's errors are RuntimeErrors
            continue
        torch.testing.assert_close(got, want, **CLOSE)
    assert torch.equal(logits_of(model, batch), want)


@pytest.mark.parametrize("first", ["enabled", "compiled"])
@pytest.mark.parametrize("number", [1, 2, -1], ids=["a-prune-layer", "between", "the-last"])
def test_a_layer_exchanged_for_its_compiled_self(family, config, number, first):
    model, batch = fresh(family), batch_of(family)
    layers = layers_of(model)
    for what in ("enabled", "compiled") if first == "enabled" else ("compiled", "enabled"):
        if what == "enabled":
            fastmmoe.enable(model, config_of(config))
        else:
            layers[number] = torch.compile(layers[number], backend="eager")
    close(logits_of(model, batch), enabled_logits(family, config))
    fastmmoe.disable(model)
    close(logits_of(model, batch), stock_logits(family))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_an_enabled_model_is_refused(strict, config):
    """What stock transformers exports; afterwards it still does."""
    model, batch = fresh("internvl"), batch_of("internvl")

    def export(strict):
        return torch.export.export(model, (), kwargs=batch | {"use_cache": False}, strict=strict)

    fastmmoe.enable(model, config_of(config))
    with pytest.raises(Exception, match="fastmmoe: a prefill reads on the host"):
        export(strict)
    torch.testing.assert_close(logits_of(model, batch), enabled_logits("internvl", config), rtol=0, atol=0)
    fastmmoe.disable(model)
    close(export(False).module()(**batch, use_cache=False).logits, stock_logits("internvl"))
