"""Threads and asyncio tasks that share a model. A block holds for whoever entered it, as `torch.no_grad` does."""

import asyncio
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import pytest
import torch

import fastmmoe

from .common import (
    CONFIGS,
    assert_stock,
    batch_of,
    config_of,
    enabled_logits,
    fresh,
    layers_of,
    logits_of,
    state_of,
    stock_logits,
    words,
)

PATIENCE = 60  # seconds after which a thread is stuck

# a thread in a block, or without another's block beside it, is told nothing
pytestmark = pytest.mark.filterwarnings("error:.*enabled.*:UserWarning")


class Worker:
    """A thread that runs what it is told to, one call after the other: `worker(function, ...)` returns the result."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, function, *args):
        return self._pool.submit(function, *args).result(PATIENCE)

    def stop(self):
        self._pool.shutdown()


@pytest.fixture
def workers():
    both = Worker(), Worker()
    yield both
    for worker in both:
        worker.stop()


@pytest.fixture
def model(family):
    return fresh(family)


@pytest.fixture
def before(model):
    return state_of(model)


@pytest.fixture
def sees(model, family):
    """Whether a forward of this thread gives what a config gives, bit for bit; None: the stock model."""
    batch = batch_of(family)

    def check(name):
        want = stock_logits(family) if name is None else enabled_logits(family, name)
        return torch.equal(logits_of(model, batch), want)

    return check


def told(call, *args):
    """The result of a call that warns of another thread's block."""
    with pytest.warns(UserWarning, match="enabled"):
        return call(*args)


def whatever_it_is_told(call, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args)


def enter(model, name):
    block = fastmmoe.enabled(model, config_of(name))
    block.__enter__()
    return block


def leave(block):
    block.__exit__(None, None, None)


# ------------------------------------------------------------------------------------------------ blocks in threads


@pytest.mark.parametrize(
    ("name", "other"), [("both", "experts"), ("experts", "prune"), ("prune", "both")], ids=lambda name: name
)
def test_blocks_that_overlap(workers, model, before, family, sees, name, other):
    """Entered one after the other, left in the same order."""
    one, two = workers
    first = one(enter, model, name)
    assert one(sees, name)
    second = two(enter, model, other)
    for _ in range(2):
        assert one(sees, name)
        assert two(sees, other)
    assert len(one(fastmmoe.report, model).stages) == 2 * (name != "experts")
    assert len(two(fastmmoe.report, model).stages) == 2 * (other != "experts")
    one(leave, first)
    assert two(sees, other)
    assert told(one, sees, None)
    assert two(sees, other)
    two(leave, second)
    for run in (one, two, lambda function, *args: function(*args)):
        assert run(sees, None)
        with pytest.raises(RuntimeError, match="not enabled"):
            run(fastmmoe.report, model)
    assert_stock(model, family, before)


def test_a_thread_in_no_block_runs_what_enable_made_of_the_model(workers, model, before, family, sees):
    one, two = workers
    fastmmoe.enable(model, config_of("prune"))
    block = one(enter, model, "both")
    assert one(sees, "both")
    assert told(two, sees, "prune")
    text = two(logits_of, model, words(family))  # has no vision tokens: nothing to tell
    assert torch.equal(text, logits_of(fresh(family), words(family)))
    # `enable` outside of blocks is for everyone, and does not reach into one
    fastmmoe.enable(model, config_of("experts"))
    assert one(sees, "both")
    assert whatever_it_is_told(two, sees, "experts") and whatever_it_is_told(sees, "experts")
    fastmmoe.disable(model)
    assert one(sees, "both")
    assert whatever_it_is_told(two, sees, None)
    two(fastmmoe.enable, model, config_of("prune"))
    one(leave, block)
    for run in workers:
        assert run(sees, "prune")
    two(fastmmoe.disable, model)
    assert one(sees, None)
    assert_stock(model, family, before)


@pytest.mark.parametrize("outside", [None, "prune"])
def test_a_block_is_changed_from_within(workers, model, before, family, sees, outside):
    one, two = workers
    if outside is not None:
        fastmmoe.enable(model, config_of(outside))
    block = one(enter, model, "both")
    assert one(sees, "both")
    one(fastmmoe.enable, model, config_of("experts"))
    assert one(sees, "experts")
    assert told(two, sees, outside)
    one(fastmmoe.disable, model)
    assert one(sees, None)
    assert whatever_it_is_told(two, sees, outside)
    inner = one(enter, model, "prune")
    assert one(sees, "prune")
    one(leave, inner)
    assert one(sees, None)
    one(fastmmoe.enable, model, config_of("both"))
    assert one(sees, "both")
    one(leave, block)
    assert one(sees, outside) and two(sees, outside)
    fastmmoe.disable(model)
    assert_stock(model, family, before)


def test_a_block_in_the_only_thread(model, before, family, sees):
    """No threads at all: the same rules."""
    with fastmmoe.enabled(model, config_of("both")):
        assert sees("both")
        fastmmoe.disable(model)
        assert sees(None)
        fastmmoe.enable(model, config_of("experts"))
        assert sees("experts")
        with fastmmoe.enabled(model, config_of("prune")):
            fastmmoe.enable(model, config_of("both"))
            assert sees("both")
        assert sees("experts")
    assert_stock(model, family, before)
    fastmmoe.enable(model, config_of("prune"))
    with fastmmoe.enabled(model, config_of("both")):
        fastmmoe.disable(model)
        assert sees(None)
    assert sees("prune")
    fastmmoe.disable(model)
    assert_stock(model, family, before)


# ------------------------------------------------------------------------------------------------ all at once


@pytest.fixture
def impatient():
    """Threads take turns far more often than they do by themselves."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def run_together(functions):
    """Call all at the same moment, each in a thread; the first exception is raised."""
    start = threading.Barrier(len(functions))

    def run(function):
        torch.set_num_threads(1)
        start.wait(PATIENCE)
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(run, function) for function in functions]]


def test_every_thread_in_its_own_block(impatient, model, before, family):
    batch = batch_of(family)

    def forwards(name):
        results = []
        for _ in range(3):
            with fastmmoe.enabled(model, config_of(name)):
                results += [logits_of(model, batch) for _ in range(2)]
        return results

    names = [*CONFIGS, "both"]
    for name, results in zip(names, run_together([lambda name=name: forwards(name) for name in names]), strict=True):
        assert all(torch.equal(got, enabled_logits(family, name)) for got in results), name
    assert_stock(model, family, before)


def known(family):
    return [stock_logits(family), *(enabled_logits(family, name) for name in CONFIGS)]


def switch(model, name):
    if name is None:
        fastmmoe.disable(model)
    else:
        fastmmoe.enable(model, config_of(name))


PLACES = {
    "vision-tower": lambda model: model.model.vision_tower,
    "prune-layer-norm": lambda model: layers_of(model)[1].post_attention_layernorm,
    "experts": lambda model: layers_of(model)[2].mlp.experts,
}
SWITCHES = [(None, "both"), ("both", None), ("both", "experts"), ("prune", None)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "other"), SWITCHES, ids=[f"{name}-to-{other}" for name, other in SWITCHES])
def test_a_switch_in_the_middle_of_a_forward(workers, model, before, family, sees, place, name, other):
    """By another thread. The forward ends with what it began with, or has no part in either."""
    switch(model, name)
    ones = [True]

    def change(*_):
        if ones:
            ones.pop()
            workers[0](switch, model, other)

    handle = PLACES[place](model).register_forward_pre_hook(change)
    got = logits_of(model, batch_of(family))
    handle.remove()
    assert not ones and any(torch.equal(got, want) for want in known(family))
    assert sees(other)
    fastmmoe.disable(model)
    assert_stock(model, family, before)


def test_switching_beside_forwards(impatient, model, before, family):
    """Each forward runs with one config from its beginning to its end, or with none."""
    batch, busy = batch_of(family), 2

    def switches():
        names = cycle(["both", "experts", None, "prune"])
        while busy:
            switch(model, next(names))
            time.sleep(0.01)  # or the model would hardly ever be enabled: most of it is the call
        fastmmoe.disable(model)

    def forwards():
        nonlocal busy
        try:
            return [logits_of(model, batch) for _ in range(12)]
        finally:
            busy -= 1

    for results in run_together([forwards, forwards, switches])[:2]:
        for got in results:
            assert any(torch.equal(got, want) for want in known(family)), "neither stock nor enabled"
    assert_stock(model, family, before)


# ------------------------------------------------------------------------------------------------ tasks


def test_blocks_that_overlap_in_two_tasks(model, before, family):
    """All in one thread, each handing over to the next between its forwards."""
    batch = batch_of(family)

    async def in_a_block(name, forwards):
        results = []
        with fastmmoe.enabled(model, config_of(name)):
            for _ in range(forwards):
                await asyncio.sleep(0)
                results.append(logits_of(model, batch))
        return results

    async def in_none():
        results = []
        for _ in range(3):
            await asyncio.sleep(0)
            results.append(logits_of(model, batch))
        return results

    async def together():
        return await asyncio.gather(in_a_block("both", 2), in_a_block("experts", 4), in_none(), in_a_block("prune", 3))

    both, experts, none, prune = told(asyncio.run, together())
    assert len(both) == 2 and all(torch.equal(got, enabled_logits(family, "both")) for got in both)
    assert len(experts) == 4 and all(torch.equal(got, enabled_logits(family, "experts")) for got in experts)
    assert len(prune) == 3 and all(torch.equal(got, enabled_logits(family, "prune")) for got in prune)
    assert len(none) == 3 and all(torch.equal(got, stock_logits(family)) for got in none)
    assert_stock(model, family, before)


# ------------------------------------------------------------------------------------------------ a patch as it is put


def test_a_patch_is_whole_before_another_thread_can_call_it(model, family, monkeypatch):
    """It was put first and read its module then: a forward in between found it without its attributes."""
    from fastmmoe.prefill.patch import Patch

    put, found = Patch.put, []

    def look(patch):
        put(patch)
        # of `__slots__`, down to the class's own
        names = [name for kind in type(patch).__mro__ for name in getattr(kind, "__slots__", ())]
        found.extend((type(patch).__name__, name) for name in names if not hasattr(patch, name))

    monkeypatch.setattr(Patch, "put", look)
    fastmmoe.enable(model, config_of("both"))
    assert not found
