"""Switching FastMMoE on and off: what is refused, what is left behind, and uses beyond one prefill."""

import copy
import threading

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.methods import fastmmoe as method
from fastmmoe.prefill.cache import CACHE

from . import naive
from .tiny import IMAGE_TOKEN, tiny_batch, tiny_internvl

BOTH = FastMMoEConfig(vision_top_k=2, prune_layers=(1, 3), retention=0.4, merge_ratio=0.3)


@pytest.fixture
def model():
    return tiny_internvl()


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def generate(model, batch, **options):
    return model.generate(**batch, do_sample=False, max_new_tokens=6, **options)


def traces(model: nn.Module) -> list[str]:
    """Names of modules that carry a hook, an attribute or a config of ours (transformers has hooks of its own)."""
    found = []
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        hooks = [h for h in hooks if getattr(h, "func", h).__module__.startswith("fastmmoe")]
        odd = [key for key in vars(module) if "fastmmoe" in key]
        odd += [key for key, value in vars(module).items() if type(value).__module__.startswith("fastmmoe")]
        odd += [key for key in ("forward", "_old_forward") if key in vars(module)]
        if hooks or odd:
            found.append(name)
    return found


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FastMMoEConfig(prune_layers=(2, 6), retention=0.5), "prune_layers"),
        (FastMMoEConfig(vision_top_k=5), "vision_top_k"),
        (FastMMoEConfig(vision_top_k=2, reduction_layer=6), "reduction_layer"),
        (FastMMoEConfig(vision_top_k=2, backend="triton"), "TRITON_INTERPRET"),
    ],
    ids=["layer-beyond-the-last", "more-experts-than-k", "reduction-beyond-the-last", "triton-on-cpu"],
)
def test_a_config_that_does_not_fit(model, config, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises((ValueError, RuntimeError), match=message):
        fastmmoe.enable(model, config)
    assert traces(model) == []


def test_a_dense_layer_cannot_prune():
    model = tiny_internvl(mlp_only_layers=[2])
    with pytest.raises(ValueError, match="prune_layers: layer 2 is not a MoE layer"):
        fastmmoe.enable(model, FastMMoEConfig(prune_layers=(1, 2), retention=0.5))
    assert traces(model) == []


def test_training_mode(model):
    model.train()
    with pytest.raises(ValueError, match="training"):
        fastmmoe.enable(model, BOTH)
    model.eval()
    fastmmoe.enable(model, BOTH)
    model.train()
    with pytest.raises(RuntimeError, match="training"):
        logits_of(model, tiny_batch(model))


@pytest.mark.parametrize("arguments", [(nn.Linear(2, 2), BOTH), ("model", BOTH), (None, BOTH)])
def test_not_a_supported_model(arguments):
    with pytest.raises((TypeError, ValueError), match="model"):
        fastmmoe.enable(*arguments)


def test_unsupported_family_is_named():
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, intermediate_size=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="qwen3_moe.*internvl"):
        fastmmoe.enable(Qwen3MoeForCausalLM(config).eval(), BOTH)


def test_config_of_another_type(model):
    with pytest.raises(TypeError, match="config"):
        fastmmoe.enable(model, {"vision_top_k": 2})


def test_sliding_window_is_refused():
    model = tiny_internvl(use_sliding_window=True, sliding_window=8)
    with pytest.raises(ValueError, match="sliding"):
        fastmmoe.enable(model, BOTH)


def test_experts_that_the_kernel_does_not_compute(model):
    """They run themselves, as choices of the kernel's own do."""
    batch, experts = tiny_batch(model), model.model.language_model.layers[3].mlp.experts
    experts.act_fn = nn.GELU()  # not in its tanh approximation
    fastmmoe.enable(model, BOTH)
    got = logits_of(model, batch)
    experts.act_fn = nn.GELU("tanh")  # the kernel's
    fastmmoe.enable(model, BOTH)
    torch.testing.assert_close(got, logits_of(model, batch), rtol=0, atol=1e-2)
    assert not torch.equal(got, logits_of(model, batch))


def test_a_failed_call_leaves_the_enabled_model_as_it_was(model):
    batch = tiny_batch(model)
    fastmmoe.enable(model, BOTH)
    before = logits_of(model, batch)
    with pytest.raises(ValueError, match="prune_layers"):
        fastmmoe.enable(model, FastMMoEConfig(prune_layers=(99,), retention=0.5))
    assert torch.equal(logits_of(model, batch), before)
    assert fastmmoe.report(model).stages[0].layer == 1


def test_an_error_inside_a_forward_leaves_no_state(model):
    batch = tiny_batch(model)
    fastmmoe.enable(model, BOTH)
    before = logits_of(model, batch)
    broken = model.model.language_model.layers[3].mlp.experts
    weight = broken.down_proj
    broken.down_proj = nn.Parameter(weight[:, :, :-1])
    with pytest.raises(ValueError, match="_proj"):
        logits_of(model, batch)
    broken.down_proj = weight
    words = {"input_ids": batch["input_ids"][:1, -4:], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    logits_of(model, words)  # text only: nothing of the failed prefill is left to trip over
    assert torch.equal(logits_of(model, batch), before)
    fastmmoe.disable(model)
    assert traces(model) == []


@pytest.mark.parametrize("options", [{"output_router_logits": True}, {"cu_seq_lens_q": torch.tensor([0, 4])}])
def test_forward_options_that_cannot_work(model, options):
    batch = tiny_batch(model)
    fastmmoe.enable(model, BOTH)
    with pytest.raises(ValueError, match=next(iter(options))):
        model(**batch, **options)


def test_a_prompt_that_ends_in_an_image(model):
    batch = tiny_batch(model, (1,), text=(3, 0, 0))
    assert batch["input_ids"][0, -1] == IMAGE_TOKEN
    fastmmoe.enable(model, BOTH)
    with pytest.raises(ValueError, match="ends in a vision token"):
        model(**batch)


def test_layers_that_go_past_their_modules_are_an_error(model):
    """A fused replacement of the MoE block would silently prune nothing."""
    fastmmoe.enable(model, BOTH)
    layer = model.model.language_model.layers[3]
    layer.mlp = _Fused(layer.mlp.forward)
    with pytest.raises(RuntimeError, match="no effect"):
        model(**tiny_batch(model))


def test_attention_that_goes_past_its_config_is_an_error(model):
    fastmmoe.enable(model, BOTH)
    model.model.language_model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(RuntimeError, match="no effect"):
        model(**tiny_batch(model))


class _Fused(nn.Module):
    """Computes what an MoE block computes without calling the module the hooks are on."""

    def __init__(self, forward):
        super().__init__()
        object.__setattr__(self, "_forward", forward)

    def forward(self, hidden_states):
        return self._forward(hidden_states)


@pytest.mark.parametrize("when", ["never enabled", "no prefill yet", "disabled"])
def test_report_needs_a_prefill(model, when):
    if when != "never enabled":
        fastmmoe.enable(model, BOTH)
    if when == "disabled":
        fastmmoe.disable(model)
    with pytest.raises(RuntimeError, match="model: "):
        fastmmoe.report(model)


def test_report_of_no_model():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        fastmmoe.report("model")


# ------------------------------------------------------------------------------------------------ on and off


def test_disable_leaves_nothing_behind(model):
    fastmmoe.enable(model, BOTH)
    assert traces(model)
    logits_of(model, tiny_batch(model))
    fastmmoe.disable(model)
    fastmmoe.disable(model)  # a second time does nothing
    assert traces(model) == []


def test_enabled_restores_what_was_there(model):
    batch = tiny_batch(model)
    stock = logits_of(model, batch)
    with fastmmoe.enabled(model, BOTH):
        outer = logits_of(model, batch)
        with fastmmoe.enabled(model, FastMMoEConfig(vision_top_k=1)):
            inner = logits_of(model, batch)
        assert torch.equal(logits_of(model, batch), outer)
    assert torch.equal(logits_of(model, batch), stock)
    assert not torch.equal(outer, stock) and not torch.equal(inner, outer)
    with pytest.raises(ZeroDivisionError), fastmmoe.enabled(model, BOTH):
        raise ZeroDivisionError
    assert traces(model) == []


def test_enabling_again_takes_the_new_config(model):
    batch = tiny_batch(model)
    fastmmoe.enable(model, BOTH)
    fastmmoe.enable(model, FastMMoEConfig(vision_top_k=1))
    again = logits_of(model, batch)
    assert fastmmoe.report(model).stages == ()
    other = tiny_internvl()
    fastmmoe.enable(other, FastMMoEConfig(vision_top_k=1))
    assert torch.equal(again, logits_of(other, batch))


def test_two_models_do_not_share_state(model):
    other, batch = copy.deepcopy(model), tiny_batch(model)
    stock = logits_of(model, batch)
    fastmmoe.enable(other, BOTH)
    assert torch.equal(logits_of(model, batch), stock)


def test_threads_do_not_share_state(model):
    batches = [tiny_batch(model, (i % 3 + 1,), seed=i) for i in range(4)]
    fastmmoe.enable(model, BOTH)
    want = [logits_of(model, batch) for batch in batches]
    got = [None] * len(batches)

    def run(i):
        for _ in range(5):
            got[i] = logits_of(model, batches[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for have, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(have, wanted, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ beyond one prefill


def test_embeddings_instead_of_ids(model):
    batch = tiny_batch(model)
    fastmmoe.enable(model, BOTH)
    want = logits_of(model, batch)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    by_embeds = {"inputs_embeds": embeds, **{k: v for k, v in batch.items() if k != "input_ids"}}
    assert torch.equal(logits_of(model, by_embeds), want)


def test_hidden_states_follow_the_shorter_sequence(model):
    batch = tiny_batch(model)
    fastmmoe.enable(model, BOTH)
    want = logits_of(model, batch)
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    assert torch.equal(out.logits, want)
    lengths = [max(tokens) for tokens in fastmmoe.report(model).tokens_per_layer]
    # embeddings, then what each layer but the last returned (the last one's is normed, at full length)
    assert [h.shape[1] for h in out.hidden_states[1:-1]] == lengths[:-1]


def test_decoding_token_by_token_equals_generate(model):
    batch = tiny_batch(model, (1, 2))
    fastmmoe.enable(model, BOTH)
    out = generate(model, batch, output_logits=True, return_dict_in_generate=True)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        mask = batch["attention_mask"]
        position = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(**batch, position_ids=position, past_key_values=cache, use_cache=True).logits[:, -1]
        position = position[:, -1:]
        for step in out.logits:
            torch.testing.assert_close(logits, step, rtol=1e-3, atol=1e-3)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            position = position + 1
            logits = model(
                input_ids=logits.argmax(-1, keepdim=True), attention_mask=mask, position_ids=position,
                past_key_values=cache, use_cache=True,
            ).logits[:, -1]  # fmt: skip


def test_decoding_on_a_cache_that_the_model_made(model):
    batch = tiny_batch(model, (1, 2))
    fastmmoe.enable(model, BOTH)
    want = generate(model, batch, output_logits=True, return_dict_in_generate=True).logits[1]
    with torch.no_grad():
        position = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        out = model(**batch, position_ids=position, use_cache=True)
        mask = torch.cat((batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)), 1)
        logits = model(
            input_ids=out.logits[:, -1].argmax(-1, keepdim=True), attention_mask=mask,
            position_ids=position[:, -1:] + 1,
            past_key_values=out.past_key_values, use_cache=True,
        ).logits[:, -1]  # fmt: skip
    torch.testing.assert_close(logits, want, rtol=1e-3, atol=1e-3)


def test_later_caches_are_shorter(model):
    batch = tiny_batch(model, (2,))
    cache = DynamicCache(config=model.config.text_config)
    fastmmoe.enable(model, BOTH)
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True)
    full, first, second = (fastmmoe.report(model).tokens_per_layer[layer][0] for layer in (0, 1, 3))
    assert [cache.get_seq_length(layer) for layer in range(6)] == [full, full, first, first, second, second]


def test_second_turn_with_a_new_image(model):
    """A cache from turn one, a new image in turn two: the new image is pruned, the old one stays as it was."""
    text_config = model.config.text_config
    first, second = tiny_batch(model, (2,), seed=1), tiny_batch(model, (1,), seed=2)
    n = first["input_ids"].shape[1]
    fastmmoe.enable(model, BOTH)
    cache = DynamicCache(config=text_config)
    total = n + second["input_ids"].shape[1]
    with torch.no_grad():
        model(**first, past_key_values=cache, use_cache=True)
        after_one = [cache.get_seq_length(layer) for layer in range(6)]
        inputs = dict(second, attention_mask=torch.ones(1, total, dtype=torch.long))
        out = model(**inputs, past_key_values=cache, use_cache=True)
    report = fastmmoe.report(model)
    assert report.n_vision == (16,) and sum(report.stages[-1].dropped) > 0
    added = [cache.get_seq_length(layer) - before for layer, before in enumerate(after_one)]
    tokens = [tokens[0] for tokens in report.tokens_per_layer]
    assert added == [tokens[0], tokens[0], tokens[1], tokens[1], tokens[3], tokens[3]]
    assert out.logits.isfinite().all()

    # without padding in turn one nothing changes when it is left-padded and masked out
    padded = {
        "input_ids": nn.functional.pad(first["input_ids"], (3, 0)),
        "attention_mask": nn.functional.pad(first["attention_mask"], (3, 0)),
        "pixel_values": first["pixel_values"],
        "position_ids": nn.functional.pad(torch.arange(n), (3, 0))[None],
    }
    cache = DynamicCache(config=text_config)
    with torch.no_grad():
        model(**padded, past_key_values=cache, use_cache=True)
        mask = nn.functional.pad(torch.ones(1, total, dtype=torch.long), (3, 0))
        position = torch.arange(n, total)[None]
        again = model(
            **second | {"attention_mask": mask, "position_ids": position}, past_key_values=cache, use_cache=True
        )
    torch.testing.assert_close(again.logits, out.logits, rtol=1e-3, atol=1e-3)


def test_cropping_into_the_image_is_refused(model):
    batch = tiny_batch(model, (1,), text=(2, 1, 4))
    fastmmoe.enable(model, BOTH)
    cache = DynamicCache(config=model.config.text_config)
    n = batch["input_ids"].shape[1]
    with torch.no_grad():
        want = model(**batch, past_key_values=cache, use_cache=True).logits[:, -1]
        cache.crop(-2)  # back within the text behind the image: fine
        mask = torch.ones(1, n, dtype=torch.long)
        again = model(
            input_ids=batch["input_ids"][:, -2:], attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits[:, -1]
        torch.testing.assert_close(again, want, rtol=1e-3, atol=1e-3)
        cache.crop(-6)
        with pytest.raises(RuntimeError, match=CACHE):
            model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache, use_cache=True)


def test_prompt_lookup_decoding_equals_greedy(model):
    batch = tiny_batch(model, (2,), text=(2, 2, 6))
    fastmmoe.enable(model, BOTH)
    want = model.generate(**batch, do_sample=False, max_new_tokens=12)
    got = model.generate(**batch, do_sample=False, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("images", [(1, 2), (2,)], ids=["padded", "full"])
def test_static_cache_equals_dynamic(model, images):
    batch = tiny_batch(model, images)
    fastmmoe.enable(model, BOTH)
    want = generate(model, batch)
    got = generate(model, batch, cache_implementation="static", disable_compile=True)
    assert got.tolist() == want.tolist()


def test_bfloat16(model):
    """bf16 weights: the survivors are chosen and the tokens moved; logits stay near those of fp32."""
    batch = tiny_batch(model, (1, 2))
    fastmmoe.enable(model, BOTH)
    want = logits_of(model, batch)[:, -1]
    model.to(torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    got = logits_of(model, batch)[:, -1].float()
    assert got.isfinite().all()
    assert nn.functional.cosine_similarity(got, want).min() > 0.9


def test_expert_count_of_vision_tokens(model):
    """The routing that reaches the experts: K_v for vision tokens, K for text, from the reduction layer on."""
    seen = {}
    for number, layer in enumerate(model.model.language_model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, args, number=number: seen.__setitem__(number, (args[1] < 8).sum(-1))
        )
    batch = tiny_batch(model, (2,))
    fastmmoe.enable(model, FastMMoEConfig(vision_top_k=1, reduction_layer=3))
    logits_of(model, batch)
    vision = (batch["input_ids"][0] == IMAGE_TOKEN).tolist()
    for number, active in seen.items():
        assert active.tolist() == [1 if v and number >= 3 else 4 for v in vision], number


def test_attention_row_is_that_of_the_stock_model(model, monkeypatch):
    """What the hooks capture, against transformers' own eager attention weights."""
    batch = tiny_batch(model, (1, 2))
    eager = tiny_internvl(attn_implementation="eager")
    with torch.no_grad():
        want = eager(**batch, output_attentions=True).attentions[1][:, :, -1].mean(1)
    captured = []
    fastmmoe.enable(model, FastMMoEConfig(prune_layers=(1,), retention=0.5))
    original = method.prune_batch
    monkeypatch.setattr(method, "prune_batch", lambda *a, **kw: (captured.append(a[3]), original(*a, **kw))[1])
    logits_of(model, batch)
    torch.testing.assert_close(captured[0], want, rtol=1e-4, atol=1e-6)


def test_config_objects_of_the_oracle_and_the_package_agree():
    for name in ("merge_ratio", "window", "alpha", "strategy", "merge_method", "keep_by", "reduction_layer"):
        assert getattr(FastMMoEConfig(), name) == getattr(naive.Settings(), name)
