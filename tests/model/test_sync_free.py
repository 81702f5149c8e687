"""Nothing waits for the device: an enabled prefill reads the layout and nothing else, and with a fixed layout nothing.

Tensors on the meta device have no values. A language model that runs there cannot have read one.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.utils import import_utils

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.families import find_text_model
from fastmmoe.methods import FastVConfig, RandomConfig, SparseVLMConfig, UniformConfig
from fastmmoe.prefill.cache import CACHE
from fastmmoe_kernels import VisionLayout

from .families import LOOPS, padded, samples
from .methods import skipping
from .tiny import IMAGE_TOKEN, tiny_batch, tiny_internvl
from .tiny_deepseek import tiny_deepseek_vl2

BOTH = dict(vision_top_k=2, reduction_layer=1, prune_layers=(1, 3), retention=0.4, merge_ratio=0.3)
CONFIGS = {
    "both": FastMMoEConfig(**BOTH),
    "experts": FastMMoEConfig(vision_top_k=2),
    "prune": FastMMoEConfig(prune_layers=(1, 3), retention=0.4),
    "routing-similarity": FastMMoEConfig(**BOTH, strategy="routing_similarity"),
    "fastv": FastVConfig(retention=0.4, vision_top_k=2),
    "fastv-mean": FastVConfig(retention=0.4, query="mean"),
    "sparsevlm": SparseVLMConfig((1, 3), counts=(12, 5)),
    "random": RandomConfig((1, 3), 0.4),
    "uniform": UniformConfig((1, 3), 0.4),
    "skipping": skipping(special_tokens=(5, 6)),
    "skipping-and-pruning": skipping(**BOTH),
}
MODELS = {
    "internvl": tiny_internvl,
    "internvl-eager": lambda: tiny_internvl(attn_implementation="eager"),
    "deepseek-mha": lambda: tiny_deepseek_vl2("tiny"),
    "deepseek-mla": lambda: tiny_deepseek_vl2("base"),
}


class Reads(TorchDispatchMode):
    """Lists the ops that hand values of tensors to the host, or have shapes that depend on values."""

    NAMES = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_consecutive"}

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.NAMES or any(i is not None and i.dtype == torch.bool for i in indices):
            self.found.append(name)
        return func(*args, **kwargs or {})


def text_model(model):
    return find_text_model(model)[1]


def two_images(batch):
    """A layout without padding: 3 words, 16 vision tokens, 4 words, 16 vision tokens, 5 words per sample."""
    row = [False] * 3 + [True] * 16 + [False] * 4 + [True] * 16 + [False] * 5
    return VisionLayout.from_mask(torch.tensor([row] * batch))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_prefill_runs_without_values(make, config, batch):
    model = make().to(device="meta", dtype=torch.bfloat16)  # of which torch knows every op's shapes
    layout = two_images(batch)
    fastmmoe.enable(model, config)
    embeds = torch.empty(batch, layout.width, 64, device="meta", dtype=torch.bfloat16)
    cache = DynamicCache(config=text_model(model).config)
    meta = layout.to(torch.device("meta"))
    with torch.no_grad(), fastmmoe.fixed_layout(model, meta):
        out = text_model(model)(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state
    assert out.device.type == "meta" and out.shape == embeds.shape
    if config.prune_layers:
        lengths = [cache.get_seq_length(layer) for layer in range(6)]
        assert lengths[1] == layout.width and lengths[2] < layout.width
        assert len(config.prune_layers) == 1 or lengths[4] < lengths[2]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_padded_prefill_reads_the_layout_and_nothing_else(config, padding_side, monkeypatch):
    model = tiny_internvl()
    batch = tiny_batch(model, (1, 2), padding_side=padding_side)
    with torch.no_grad(), Reads() as stock:
        model(**batch)
    from_mask = VisionLayout.from_mask
    layouts = []

    def precomputed(vision_mask, attention_mask=None):
        # this one read is allowed, and does not count
        return layouts[0]

    layouts.append(from_mask(batch["input_ids"] == IMAGE_TOKEN, batch["attention_mask"]))
    fastmmoe.enable(model, config)
    monkeypatch.setattr(VisionLayout, "from_mask", staticmethod(precomputed))
    with torch.no_grad(), Reads() as enabled:
        model(**batch)
    assert enabled.found == stock.found
    assert fastmmoe.report(model).n_vision == (16, 32)


@pytest.mark.parametrize("name", LOOPS)
def test_a_prefill_of_any_family_reads_no_more_than_the_stock_model(name, monkeypatch):
    model, alone = samples(name)
    batch, loop = padded(alone), LOOPS[name]
    with torch.no_grad(), Reads() as stock:
        model(**batch)
    vision = torch.isin(batch["input_ids"], torch.tensor(loop.placeholders))
    layout = VisionLayout.from_mask(vision, batch["attention_mask"])
    experts = dict(vision_top_k=2, reduction_layer=1) if loop.experts else {}
    prune = dict(prune_layers=loop.prune_layers, retention=0.5, merge_ratio=0.3) if loop.prune_layers else {}
    fastmmoe.enable(model, FastMMoEConfig(**experts, **prune))
    # this one read is allowed, and does not count
    monkeypatch.setattr(VisionLayout, "from_mask", staticmethod(lambda *masks: layout))
    with torch.no_grad(), Reads() as enabled:
        model(**batch)
    assert not Counter(enabled.found) - Counter(stock.found)


def test_reads_are_found():
    x = torch.tensor([1.0, 0.0])
    with Reads() as reads:
        x[x > 0]
        x.sum().item()
        bool(x[0] > 0)
        x.nonzero()
    assert reads.found == ["index", "_local_scalar_dense", "_local_scalar_dense", "nonzero"]


def test_rank_adaptive_counts_wait_for_the_device():
    """The exception, and what the tests above would say to it."""
    model = tiny_internvl().to(device="meta")
    layout = two_images(1).to(torch.device("meta"))
    fastmmoe.enable(model, SparseVLMConfig((1, 3)))
    with torch.no_grad(), fastmmoe.fixed_layout(model, layout), pytest.raises((RuntimeError, NotImplementedError)):
        text_model(model)(inputs_embeds=torch.empty(1, layout.width, 64, device="meta"))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_fixed_layout_gives_the_same_result(padding_side):
    model = tiny_internvl()
    batch = tiny_batch(model, (1, 2), padding_side=padding_side)
    fastmmoe.enable(model, FastMMoEConfig(**BOTH))
    layout = VisionLayout.from_mask(batch["input_ids"] == IMAGE_TOKEN, batch["attention_mask"])
    with torch.no_grad():
        want = model(**batch).logits
        with fastmmoe.fixed_layout(model, layout):
            got = model(**batch).logits
        other = tiny_batch(model, (2, 1, 1), seed=3)
        after = model(**other).logits  # the block has ended
    assert torch.equal(got, want)
    fastmmoe.disable(model)
    fastmmoe.enable(model, FastMMoEConfig(**BOTH))
    with torch.no_grad():
        assert torch.equal(model(**other).logits, after)


def test_fixed_layout_refuses_what_it_does_not_describe():
    model = tiny_internvl()
    layout = two_images(1)
    embeds = torch.zeros(1, layout.width, 64)
    with pytest.raises(RuntimeError, match="not enabled"), fastmmoe.fixed_layout(model, layout):
        pass
    fastmmoe.enable(model, FastMMoEConfig(**BOTH))
    with pytest.raises(TypeError, match="layout: expected a VisionLayout"), fastmmoe.fixed_layout(model, None):
        pass
    with torch.no_grad(), fastmmoe.fixed_layout(model, layout):
        with pytest.raises(ValueError, match="layout: expected forwards with 1 samples of 44 tokens"):
            text_model(model)(inputs_embeds=embeds[:, 1:])
        cache = text_model(model)(inputs_embeds=embeds, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=f"{CACHE}: expected an empty cache"):
            text_model(model)(inputs_embeds=embeds, past_key_values=cache)
    padded = VisionLayout.from_mask(torch.ones(1, 4).bool(), torch.tensor([[0, 1, 1, 1]]))
    with fastmmoe.fixed_layout(model, padded), pytest.raises(ValueError, match="attention_mask: expected one"):
        text_model(model)(inputs_embeds=embeds[:, :4])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_captured_prefill_of_a_full_batch_makes_no_mask(config, monkeypatch):
    """What makes SDPA run flash attention: no mask, causal, grouped keys as they are."""
    model = tiny_internvl()
    layout = two_images(2)
    fastmmoe.enable(model, config)
    embeds = torch.randn(2, layout.width, 64, generator=torch.Generator().manual_seed(0))
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def prefill():
        cache = DynamicCache(config=text_model(model).config)
        return text_model(model)(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state

    with torch.no_grad(), fastmmoe.fixed_layout(model, layout):
        want = prefill()
        monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
        monkeypatch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda query, key, *args, **kwargs: calls.append((key, kwargs)) or attend(query, key, *args, **kwargs),
        )
        got = prefill()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(calls) == 6
    for key, kwargs in calls:
        assert kwargs["attn_mask"] is None and kwargs["is_causal"] and key.shape[1] == 2


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_captured_prefill_of_a_padded_batch_keeps_its_mask(padding_side, monkeypatch):
    model = tiny_internvl()
    batch = tiny_batch(model, (1, 2), padding_side=padding_side)
    fastmmoe.enable(model, FastMMoEConfig(**BOTH))
    with torch.no_grad():
        want = model(**batch).logits
        monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
        torch.testing.assert_close(model(**batch).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_whole_prefill_is_captured_as_a_cuda_graph(config):
    model = tiny_internvl().cuda()
    # in float32, transformers' own grouped GEMM reads on the host
    text_model(model).set_experts_implementation("fastmmoe")
    layout = two_images(2)
    fastmmoe.enable(model, config)
    generator = torch.Generator("cuda").manual_seed(0)
    embeds = torch.randn(2, layout.width, 64, device="cuda", generator=generator)
    other = torch.randn(2, layout.width, 64, device="cuda", generator=generator)

    def prefill():
        # without a cache, transformers reads whether position ids tell of packed rows
        cache = DynamicCache(config=text_model(model).config)
        return text_model(model)(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state

    with torch.no_grad(), fastmmoe.fixed_layout(model, layout):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            prefill()
            torch.cuda.set_sync_debug_mode("error")
            try:
                prefill()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = prefill()
        for values in (embeds.clone(), other):
            embeds.copy_(values)
            want = prefill()
            out.fill_(float("nan"))
            graph.replay()
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)


def test_a_model_that_is_called_within_a_captured_prefill_keeps_its_mask(monkeypatch):
    model, other = tiny_internvl(), tiny_internvl()
    layout, batch = two_images(2), tiny_batch(other, (1, 2))
    fastmmoe.enable(model, FastMMoEConfig(**BOTH))
    embeds = torch.randn(2, layout.width, 64, generator=torch.Generator().manual_seed(0))
    got = []
    text_model(model).layers[2].register_forward_hook(lambda *_: got.append(other(**batch).logits))
    with torch.no_grad(), fastmmoe.fixed_layout(model, layout):
        want = other(**batch).logits
        monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
        text_model(model)(inputs_embeds=embeds, past_key_values=DynamicCache(config=text_model(model).config))
    torch.testing.assert_close(got[-1], want, rtol=1e-4, atol=1e-4)
