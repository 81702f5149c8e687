"""Packed batches: every sample of a row gets what it gets alone, and no padding is computed."""

import pytest
import torch

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.methods import FastVConfig, SparseVLMConfig, UniformConfig
from fastmmoe.prefill.packing import Packing, read_packed_layout
from fastmmoe_kernels import VisionLayout

from .methods import skipping
from .tiny import IMAGE_TOKEN, tiny_batch, tiny_internvl
from .tiny_deepseek import tiny_deepseek_batch, tiny_deepseek_vl2

PRUNE = dict(prune_layers=(1, 3), retention=0.4, merge_ratio=0.3)
CONFIGS = {
    "nothing": FastMMoEConfig(),
    "experts": FastMMoEConfig(vision_top_k=2),
    "prune": FastMMoEConfig(**PRUNE),
    "both": FastMMoEConfig(vision_top_k=2, reduction_layer=1, **PRUNE),
    "keep-by-redundancy": FastMMoEConfig(**PRUNE, keep_by="redundancy"),
    "fastv": FastVConfig(layer=2, retention=0.5, vision_top_k=2),
    "fastv-mean": FastVConfig(layer=2, retention=0.5, query="mean"),
    "sparsevlm": SparseVLMConfig(layers=(1, 3), keep_ratios=(0.6, 0.6)),
    "uniform": UniformConfig(prune_layers=(1, 3), retention=0.4),
    "skipping": skipping(special_tokens=tuple(range(20, 60)), **PRUNE),
}
IMAGES = {"mixed": (1, 3, 2), "a-sample-without": (2, 0, 1), "one": (2,), "equal": (1, 1)}


def samples_of(batch, images):
    """Every sample of a batch alone, without padding."""
    first = 0
    for row, count in enumerate(images):
        valid = batch["attention_mask"][row].bool()
        sample = {"input_ids": batch["input_ids"][row][valid].unsqueeze(0)}
        if count:
            sample["pixel_values"] = batch["pixel_values"][first : first + count]
        first += count
        yield sample


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_sample_gets_what_it_gets_alone(config, images, attention):
    model = tiny_internvl(attn_implementation=attention)
    batch = tiny_batch(model, images)
    packed = fastmmoe.pack_batch(batch)
    assert packed["input_ids"].shape == (1, batch["attention_mask"].sum())
    fastmmoe.enable(model, config)
    with torch.no_grad():
        got = model(**packed).logits[0]
        report = fastmmoe.report(model)
        ends = packed["cu_seq_lens_q"][1:].tolist()
        alone = []
        for sample, end in zip(samples_of(batch, images), ends, strict=True):
            # positions in front of the last one hold zeros where tokens were dropped
            torch.testing.assert_close(got[end - 1], model(**sample).logits[0, -1], rtol=1e-3, atol=1e-3)
            if "pixel_values" in sample:
                alone.append(fastmmoe.report(model).tokens_per_layer)
    together = [[tokens[b] for tokens in report.tokens_per_layer] for b, count in enumerate(images) if count]
    assert together == [[tokens[0] for tokens in sample] for sample in alone]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_packed_sample_of_deepseek_vl2_gets_what_it_gets_alone(config):
    """Its processor pads images per sample; the row has those of all samples."""
    model, batch = tiny_deepseek_vl2("base"), tiny_deepseek_batch([[(1, 1)], [], [(2, 1), (1, 2)]])
    with torch.no_grad(), fastmmoe.enabled(model, config):
        packed = fastmmoe.pack_batch(batch)
        got = model(**packed).logits[0]
        for row, end in enumerate(packed["cu_seq_lens_q"][1:].tolist()):
            valid = batch["attention_mask"][row].bool()
            alone = {name: value[row : row + 1] for name, value in batch.items() if name != "attention_mask"}
            alone |= {name: alone[name][:, valid] for name in ("input_ids", "images_seq_mask")}
            torch.testing.assert_close(got[end - 1], model(**alone).logits[0, -1], rtol=1e-3, atol=1e-3)


def test_layers_see_no_padding():
    model = tiny_internvl()
    batch = tiny_batch(model, (1, 3, 2))
    seen = {}
    for number, layer in enumerate(model.model.language_model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, args, n=number: seen.update({n: args[0].shape[:2]}))
    fastmmoe.enable(model, CONFIGS["both"])
    with torch.no_grad():
        model(**fastmmoe.pack_batch(batch))
    tokens = fastmmoe.report(model).tokens_per_layer
    assert [seen[layer] for layer in range(6)] == [(1, sum(tokens[layer])) for layer in range(6)]


def test_flash_attention_is_told_where_samples_are():
    """Its arguments, since flash attention itself needs a GPU."""
    model = tiny_internvl()
    batch = tiny_batch(model, (1, 3, 2))
    told = {}
    for number, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, n=number: told.update({n: kwargs}), with_kwargs=True
        )
    fastmmoe.enable(model, CONFIGS["both"])
    with torch.no_grad():
        model(**fastmmoe.pack_batch(batch))
    report = fastmmoe.report(model)
    for layer in range(6):
        entering = report.tokens_per_layer[max(layer - 1, 0)]  # layer 1's attention is in front of its pruning
        bounds = [0]
        for length in entering:
            bounds.append(bounds[-1] + length)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            assert told[layer][name].dtype == torch.int32 and told[layer][name].tolist() == bounds
        assert told[layer]["max_length_q"] == told[layer]["max_length_k"] == max(entering)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_packing_and_padding_are_inverse(padding_side):
    lengths, width = (3, 5, 1), 5
    position = torch.arange(width)
    length = torch.tensor(lengths).unsqueeze(1)
    valid = position >= width - length if padding_side == "left" else position < length
    layout = VisionLayout.from_mask(torch.zeros_like(valid), valid)
    packing = Packing.of(layout)
    row = torch.randn(1, 9, 2, 4)
    padded = packing.pad(row)
    assert padded.shape == (3, 5, 2, 4) and packing.bounds.tolist() == [0, 3, 8, 9]
    assert torch.equal(padded[valid], row[0])
    assert torch.equal(packing.pack(padded), row)
    assert packing.sample.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert torch.equal(packing.pad(row.transpose(1, 2), dim=2), padded.transpose(1, 2))


@pytest.mark.parametrize(
    ("vision", "bounds", "message"),
    [
        (torch.zeros(2, 4).bool(), [0, 4], "input_ids: expected one row"),
        (torch.zeros(1, 4).bool(), [0, 3], "cu_seq_lens_q"),
        (torch.zeros(1, 4).bool(), [1, 4], "cu_seq_lens_q"),
        (torch.zeros(1, 4).bool(), [0, 2, 2, 4], "cu_seq_lens_q"),
        (torch.zeros(1, 4).bool(), [0], "cu_seq_lens_q"),
    ],
)
def test_bounds_that_describe_no_row(vision, bounds, message):
    with pytest.raises(ValueError, match=message):
        read_packed_layout(vision, torch.tensor(bounds))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_cache": True}, "use_cache: expected False"),
        ({"attention_mask": torch.ones(1, 80, dtype=torch.long)}, "attention_mask: expected None"),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, "cu_seq_lens_q: expected bounds"),
    ],
    ids=["cache", "mask", "bounds"],
)
def test_what_does_not_go_with_a_row_is_refused(change, message):
    model = tiny_internvl()
    batch = tiny_batch(model, (1, 2))
    fastmmoe.enable(model, CONFIGS["both"])
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**fastmmoe.pack_batch(batch) | change)
    packed = fastmmoe.pack_batch(batch)
    layout = VisionLayout.from_mask(packed["input_ids"] == IMAGE_TOKEN)
    with torch.no_grad(), fastmmoe.fixed_layout(model, layout), pytest.raises(ValueError, match="fixed_layout"):
        model(**packed)


def test_a_sample_without_tokens_is_refused():
    with pytest.raises(ValueError, match="attention_mask: expected tokens in every sample"):
        fastmmoe.pack_batch(
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}
        )
