"""What attention is told behind a stage against lists of slots: of steps that prefill, decode or fill a graph."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from fastmmoe import FastMMoEConfig
from fastmmoe.engines.vllm.metadata import StageTables
from fastmmoe.engines.vllm.plan import Prompt, Row, Rules, Step

RULES = Rules(FastMMoEConfig(prune_layers=(1, 2), retention=0.3), 500)
BLOCK, BLOCKS, ROWS, TOKENS = 4, 40, 8, 400
CONFIG = SimpleNamespace(
    scheduler_config=SimpleNamespace(max_num_seqs=ROWS, max_num_batched_tokens=TOKENS),
    compilation_config=SimpleNamespace(max_cudagraph_capture_size=16),
)


@st.composite
def rows(draw):
    before, image, behind = draw(st.integers(0, 5)), draw(st.integers(0, 20)), draw(st.integers(1, 5))
    prompt = Prompt.of(RULES, before + image + behind, [(before, before + image)] if image else [], False)
    if draw(st.booleans()):
        return Row(prompt, 0, prompt.length + draw(st.integers(0, 2)), prompt.prunes)
    return Row(prompt, prompt.length + draw(st.integers(0, 5)), draw(st.integers(1, 3)), prompt.prunes)


def common_metadata(step, table, padded_rows=0, padded_tokens=0):
    """As a runner makes it, with rows and tokens that fill a graph's size."""
    lengths = [row.computed + row.new for row in step.rows] + [0] * padded_rows
    starts = torch.nn.functional.pad(torch.from_numpy(step.bounds(0)), (0, padded_rows), value=int(step.bounds(0)[-1]))
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=int(starts[-1]) + padded_tokens,
        max_query_len=max(row.new for row in step.rows),
        max_seq_len=max(lengths),
        block_table_tensor=table[: len(lengths)],
        slot_mapping=torch.full((int(starts[-1]) + padded_tokens,), -7),
    )


@pytest.fixture(scope="module")
def table():
    """Every row's blocks, int32 [rows, blocks]: none is in two rows."""
    order = torch.randperm(16 * BLOCKS, generator=torch.Generator().manual_seed(0))
    return order.view(16, BLOCKS).int()


def slot_of(table, row, position):
    return int(table[row, position // BLOCK]) * BLOCK + position % BLOCK


@settings(max_examples=200, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=ROWS), st.integers(1, 2), st.integers(0, 3), st.integers(0, 5))
def test_against_lists(table, batch, stage, padded_rows, padded_tokens):
    step = Step(2, batch)
    if step.prunes:  # runs without a graph
        padded_rows = padded_tokens = 0
    tables = StageTables(CONFIG, torch.device("cpu"))
    tables.slots.fill_(12345)
    tables.seq_lens.fill_(12345)
    tables.begin(step, stage)
    short = tables.shorten(stage, common_metadata(step, table, padded_rows, padded_tokens), BLOCK)
    slots, lengths = [], []
    for number, row in enumerate(batch):
        gone = row.prompt.removed(stage) if row.is_short else 0
        length = row.computed + row.new - gone
        new = row.new - (gone if row.is_pruned_now else 0)
        slots += [slot_of(table, number, position) for position in range(length - new, length)]
        lengths.append(length)
    assert short.seq_lens.tolist() == lengths + [0] * padded_rows
    assert short.seq_lens_cpu_upper_bound.tolist() == lengths + [0] * padded_rows
    assert short.max_seq_len == max(lengths)
    assert short.slot_mapping.tolist() == slots + [-1] * padded_tokens
    assert short.num_actual_tokens == len(slots) + padded_tokens
    assert (tables.slots[len(slots) :] == -1).all()
    assert short.query_start_loc.tolist()[-1] == len(slots)
    # fixed addresses: graphs read them
    assert short.seq_lens.data_ptr() == tables.seq_lens.data_ptr()
    assert short.slot_mapping.data_ptr() == tables.slots.data_ptr()


def test_nothing_is_written_to_the_cache_while_profiling(table):
    step = Step(2, [Row(Prompt.of(RULES, 9, [], False), 9, 1, False)] * 3)
    tables = StageTables(CONFIG, torch.device("cpu"))
    tables.begin(step, 1)
    tables.shorten(1, common_metadata(step, table), BLOCK)
    tables.begin(None, 1)
    short = tables.shorten(1, common_metadata(step, table), BLOCK)
    assert (tables.slots == -1).all() and short.seq_lens.tolist() == [10, 10, 10]
