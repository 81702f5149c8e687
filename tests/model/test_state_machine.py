"""Any sequence of uses of one model, by two threads: every result is that of a fresh model with the config in force.

The reference is small: what is enabled outside of all blocks, and each thread's stack of open `enabled` blocks. A block
holds for the thread that entered it, the innermost one counts, `enable` and `disable` act on it, and leaving it, in
whatever order, brings back what is below.

A short slice of fixed sequences runs by default. `FASTMMOE_STATE_MACHINE_EXAMPLES=400` runs so many random ones of each
of the two families in `SEEDS`, and a twelfth as many of every other; a failure prints the seed, which
`FASTMMOE_STATE_MACHINE_SEED` takes.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import queue
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import combinations, count
from types import SimpleNamespace
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

import fastmmoe

from . import calls
from .calls import BATCHES, FAMILIES, FORWARDS, GENERATIONS, WORDS, Answer

# kind of sequence: what it may do that the others do not -> sequences of each family in the slice
KINDS = {"plain": 8, "offload": 4, "compiled layers": 3, "compiled": 2}
SEEDS = {"internvl": 5, "deepseek_vl2": 8}  # of the slice: with these, a model is compiled
SHORT = {"qwen3_vl_moe": 1, "lfm2_vl_lfm2_moe": 1, "ernie4_5_vl_moe": 1}  # seeds of a sequence each
STEPS = 25
SOME = 10  # sequences of one seed, at most
EXAMPLES = int(os.environ.get("FASTMMOE_STATE_MACHINE_EXAMPLES", "0"))
TIMEOUT = 120  # seconds until a thread that does not answer is a deadlock
NOT_POISONED = {(torch, "empty"): torch.empty, (torch, "empty_like"): torch.empty_like}
NOT_POISONED |= {(torch.Tensor, "new_empty"): torch.Tensor.new_empty}
TESTED = [*FAMILIES] if EXAMPLES else [*SEEDS, *SHORT]
CASES = [(family, kind) for family in TESTED for kind in KINDS if EXAMPLES or family in SEEDS or kind == "plain"]


@pytest.mark.parametrize("family", TESTED)
def test_configs_can_be_told_apart(family):
    """Else a sequence could mix them up unseen."""
    answers = {config: calls.wanted(family, config, "left").tensors[0] for config in (None, *calls.configs(family))}
    assert torch.equal(answers.pop("nothing"), answers[None])
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in combinations(answers.values(), 2))


@pytest.mark.parametrize("family", TESTED)
def test_no_family_loses_its_uses_or_configs(family):
    """`-s` prints what is left."""
    uses, configs = calls.uses_of(family), calls.configs(family)
    methods = {type(config).__name__.removesuffix("Config") for config in configs.values()}
    print(f"{family}: {', '.join(methods)}; {len(configs)} configs; without {calls.USES.keys() - uses.keys()}")
    assert uses.keys() >= {"text", "one", "left", "right", "mixed", "last logits", "fixed layout", "greedy"}
    prunes = calls.prune_layers(family)
    assert methods >= ({"FastMMoE", "FastV", "SparseVLM", "Random", "Uniform"} if prunes else {"FastMMoE", "Random"})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_any_sequence(family, kind):
    if kind == "offload":
        pytest.importorskip("accelerate")
        if not calls.can_be_offloaded(family):
            pytest.skip("the stock model cannot")
    if not EXAMPLES:
        # of a seed's sequences, the first does next to nothing
        seed, examples = (SEEDS[family], KINDS[kind]) if family in SEEDS else (SHORT[family], 2)
        run_sequences(family, kind, seed, examples, mixed=True)
        return
    # a few at a time: Hypothesis makes most of a longer run by changing sequences that it had
    first = int(os.environ.get("FASTMMOE_STATE_MACHINE_SEED", random.SystemRandom().randrange(10**9)))
    examples = EXAMPLES * KINDS[kind] / sum(KINDS.values()) / (1 if family in SEEDS else 12)
    runs = math.ceil(examples / SOME)
    for number in range(first, first + runs):
        print(f"FASTMMOE_STATE_MACHINE_SEED={number}")
        # with few of the rules in every second one
        run_sequences(family, kind, number, math.ceil(examples / runs), mixed=number % 2 == 0)


def run_sequences(family: str, kind: str, seed: int, examples: int, mixed: bool) -> None:
    @hypothesis.seed(seed)
    class Sequence(Machine):
        pass

    Sequence.family, Sequence.kind, Sequence.mixed = family, kind, mixed
    run_state_machine_as_test(
        Sequence,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink) if EXAMPLES else (Phase.generate,),  # shrinking takes minutes
            print_blob=bool(EXAMPLES),
            suppress_health_check=list(HealthCheck),
        ),
    )


# ------------------------------------------------------------------------------------------------ reference


class State(NamedTuple):
    """What is in force: a config's name, None for the stock model; whether it was enabled from below the head."""

    config: str | None = None
    by_parent: bool = False


@dataclass
class Block:
    """An open `with enabled(...)`."""

    manager: Any
    state: State


@dataclass
class Kept:
    """A cache, and what its rows hold: (sample of the batch, words behind the prompt) each."""

    config: str | None
    batch: str
    cache: Cache
    mask: torch.Tensor  # [rows, tokens]
    rows: list[tuple[int, tuple[int, ...]]]
    cropped: int = 0  # tokens of the prompt


class Worker:
    """A second thread that does what it is told, one thing at a time."""

    def __init__(self):
        self._jobs, self._results = queue.SimpleQueue(), queue.SimpleQueue()
        self._go = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for job in iter(self._jobs.get, None):
            try:
                self._results.put((job(), None))
            except BaseException as error:  # handed on to the thread that asks
                self._results.put((None, error))

    def do(self, job: Callable[[], Any]) -> Any:
        """Its result, or None where it called `pause`; then `resume` returns the result."""
        self._jobs.put(job)
        return self._result()

    def pause(self) -> None:
        """Inside a job: let `do` return, and wait."""
        self._results.put((None, None))
        self._go.acquire(timeout=TIMEOUT)

    def resume(self) -> Any:
        self._go.release()
        return self._result()

    def _result(self) -> Any:
        result, error = self._results.get(timeout=TIMEOUT)
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        self._go.release()
        self._jobs.put(None)
        self._thread.join(TIMEOUT)


def traces(model: nn.Module, family: str, is_wrapped: bool = False) -> list[str]:
    """What modules carry that those of a model that was never run do not, transformers' and torch's marks apart.

    `is_wrapped`: somebody put a forward around ours and holds on to it; then it may stay, if it does nothing.
    """
    found = []
    stock = dict(calls.pristine(family).named_modules())
    modules = dict(model.named_modules())
    assert modules.keys() == stock.keys()
    for name, module in modules.items():
        attributes, before = vars(module), vars(stock[name])
        odd = attributes.keys() ^ before.keys()
        odd |= {key for key in attributes.keys() & before.keys() if type(attributes[key]) is not type(before[key])}
        odd -= {*calls.MARKS, *calls.kept_by_transformers(family)}
        # accelerate leaves a module's own forward behind, on the instance
        if is_wrapped or getattr(attributes.get("forward"), "__func__", None) is type(module).forward:
            odd.discard("forward")
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(_module_of(hook).startswith("fastmmoe") for hook in hooks):
            odd.add("hooks")
        if type(module) is not type(stock[name]):
            odd.add(type(module).__name__)
        found += [f"{name}: {sorted(odd)}"] if odd else []
    return found


def _module_of(hook: Any) -> str:
    hook = getattr(hook, "func", hook)
    return getattr(hook, "__module__", None) or type(hook).__module__


@contextmanager
def dynamo() -> Iterator[None]:
    """Compilation from a clean slate; Dynamo traces torch's own functions, and remembers which those are."""
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=64):
        for (owner, name), function in NOT_POISONED.items():
            patch.setattr(owner, name, function)
        torch._dynamo.trace_rules.clear_lru_cache()
        torch._dynamo.reset()
        try:
            yield
        finally:
            torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ draws


def of_family(names: Callable[[str], Iterable[str]]) -> st.SearchStrategy[str]:
    """One of what the machine's family has."""
    return st.runner().flatmap(lambda machine: st.sampled_from([*names(machine.family)]))


THREADS = ("main", "worker")
anyone = st.sampled_from((*THREADS, "passer-by"))  # the last one is a new thread each time
threads = st.sampled_from(THREADS)
configs = of_family(calls.configs)
handles = st.sampled_from(("model", "parent", "wrapper", "compiled"))
forwards = of_family(lambda family: [name for name in calls.uses_of(family) if name in FORWARDS])
generations = of_family(lambda family: [name for name in calls.uses_of(family) if name in GENERATIONS])
probes = st.none() | forwards
modules = st.integers(0, 199)
words = st.integers(0, len(WORDS) - 1)
errors = st.sampled_from((RuntimeError, KeyboardInterrupt, SystemExit))
INTERRUPTED = ("own cache", "left", "right", "mixed", "four logits", "parent", "fixed layout", *GENERATIONS)
HELD = ("left", "mixed", "fixed layout", "two turns", "greedy")


def interrupted(family: str) -> list[str]:
    return [name for name in INTERRUPTED if name in calls.uses_of(family) or name == "own cache"]


def held(family: str) -> list[str]:
    """Without decoding, if the stock model keeps what that needs of its last prefill, whichever thread's it was."""
    decoding = ("two turns", "greedy") if calls.kept_by_transformers(family) else ()
    return [name for name in HELD if name in calls.uses_of(family) and name not in decoding]


class Machine(RuleBasedStateMachine):
    family: str
    kind: str
    mixed: bool
    caches = Bundle("caches")

    def __init__(self):
        super().__init__()
        self.model = calls.fresh(self.family)
        self.configs, self.uses = calls.configs(self.family), calls.uses_of(self.family)
        self.tolerance = FAMILIES[self.family].tolerance
        self.handles = {
            "model": self.model,
            "parent": calls.parent_of(self.model),
            "wrapper": calls.Wrapper(self.model),
            "compiled": torch.compile(self.model, backend="eager"),  # compiles nothing until it is called
        }
        self.base = State()
        self.blocks: dict[str, list[Block]] = {name: [] for name in THREADS}
        self.worker = Worker()
        self.held: Callable[[], None] | None = None  # lets the worker go on
        self.offloaded = self.was_offloaded = self.is_wrapped = False
        self.compiled = 0
        if self.mixed:  # Hypothesis switches most rules off in most sequences, too many for a few sequences
            self._rules_strategy.enabled_rules_strategy = st.just(SimpleNamespace(is_enabled=lambda name: True))

    # -------------------------------------------------------------------------------- who does it, and what is right

    def do(self, who: str, job: Callable[[], Any]) -> Any:
        if who == "main":
            return job()
        if who == "worker":
            self.let_go()
            return self.worker.do(job)
        passer_by = Worker()
        try:
            return passer_by.do(job)
        finally:
            passer_by.end()

    def in_force(self, who: str) -> State:
        blocks = self.blocks.get(who)
        return blocks[-1].state if blocks else self.base

    def set_in_force(self, who: str, state: State) -> None:
        blocks = self.blocks.get(who)
        if blocks:
            blocks[-1].state = state
        else:
            self.base = state

    def asking(self, name: str, state: State, reported: str = "model") -> Callable[[], Answer]:
        use = self.uses[name]
        handle = self.handles[reported] if state.config is not None and use.sees else None
        return lambda: calls.answer(self.model, self.family, use.run, handle)

    def compare(self, got: Answer, name: str, state: State, exact: bool = True) -> None:
        use = self.uses[name]
        wanted = [calls.wanted(self.family, state.config, name)]
        if state.by_parent and use.depends_on_head:  # not known there, unless from an earlier call
            wanted.append(calls.wanted(self.family, state.config, name, by_parent=True))
        exact = exact and use.oracle is None and not self.offloaded
        problems = [calls.differences(got, want, None if exact else self.tolerance) for want in wanted]
        assert None in problems, f"{name} under {state.config}: {problems[0]}"

    def check(self, who: str, name: str, reported: str = "model") -> None:
        state = self.in_force(who)
        if name == "in one row" and state.config == "above 30":
            return  # together they have as many vision tokens
        asking = self.asking(name, state, reported)
        if name == "fixed layout" and state.config is None:
            with pytest.raises(RuntimeError, match="not enabled"):
                self.do(who, asking)
            return
        self.compare(self.do(who, asking), name, state)

    def probe(self, name: str | None) -> None:
        """Look at what is in force for everybody."""
        for who in (*THREADS, "passer-by") if name else ():
            if who != "worker" or self.held is None:
                self.check(who, name)

    # -------------------------------------------------------------------------------- on and off

    @initialize(config=configs)
    def begin(self, config):
        self.enable("main", "model", config, "one")

    @rule(who=anyone, handle=handles, config=configs, probe=probes)
    def enable(self, who, handle, config, probe):
        self.do(who, lambda: fastmmoe.enable(self.handles[handle], self.configs[config]))
        self.set_in_force(who, State(config, handle == "parent"))
        self.probe(probe)

    @precondition(lambda self: self._is_enabled())
    @rule(who=anyone, handle=handles, probe=probes)
    def disable(self, who, handle, probe):
        self.do(who, lambda: fastmmoe.disable(self.handles[handle]))
        self.set_in_force(who, State())
        if not any(self.blocks.values()):
            with pytest.raises(RuntimeError, match="model: "):
                fastmmoe.report(self.model)
        self.probe(probe)

    @rule(who=anyone, handle=handles, reason=of_family(calls.refused), block=st.booleans(), probe=probes)
    def refused(self, who, handle, reason, block, probe):
        """What `enable` does not take changes nothing."""
        config, error, message = calls.refused(self.family)[reason]
        module = self.handles[handle]

        def enter():
            with fastmmoe.enabled(module, config):
                raise AssertionError("entered")

        with self.training() if reason == "training mode" else nullcontext():
            with pytest.raises(error, match=message):
                self.do(who, enter if block else lambda: fastmmoe.enable(module, config))
        self.probe(probe)

    @contextmanager
    def training(self) -> Iterator[None]:
        self.let_go()
        self.handles["wrapper"].train()
        try:
            yield
        finally:
            self.handles["wrapper"].eval()

    @precondition(lambda self: min(map(len, self.blocks.values())) < 3)
    @rule(who=threads, handle=handles, config=configs, probe=probes)
    def enter(self, who, handle, config, probe):
        manager = fastmmoe.enabled(self.handles[handle], self.configs[config])
        assert self.do(who, manager.__enter__) is self.handles[handle]
        self.blocks[who].append(Block(manager, State(config, handle == "parent")))
        self.probe(probe)

    @precondition(lambda self: any(self.blocks.values()))
    @rule(who=threads, depth=st.sampled_from((0, 0, 1)), by_error=st.booleans(), probe=probes)
    def leave(self, who, depth, by_error, probe):
        """The innermost block, or the one around it."""
        if not self.blocks[who]:
            who = THREADS[1 - THREADS.index(who)]
        block = self.blocks[who].pop(-1 - min(depth, len(self.blocks[who]) - 1))
        error = ZeroDivisionError() if by_error else None
        swallowed = self.do(who, lambda: block.manager.__exit__(type(error) if error else None, error, None))
        assert not (error and swallowed)
        self.probe(probe)

    @rule(who=anyone, action=st.sampled_from(("forward", "leave", "disable")), probe=probes)
    def in_training_mode(self, who, action, probe):
        with self.training():
            if action == "forward":
                self._train(who)
            elif action == "leave" and any(self.blocks.values()):
                self.leave(who if who in THREADS else "main", 0, False, None)
            else:
                self.disable(who, "model", None)
        self.probe(probe)

    def _train(self, who):
        config = self.in_force(who).config
        job = self.asking("left", State())
        if config is None:
            self.do(who, job)
            return
        # one that reduces nothing need not be refused
        with pytest.raises(RuntimeError, match="training") if config != "nothing" else suppress(RuntimeError):
            self.do(who, job)

    # -------------------------------------------------------------------------------- forwards and generations

    @rule(who=anyone, name=forwards, reported=handles)
    def forward(self, who, name, reported):
        self.check(who, name, reported)

    @rule(who=anyone, name=generations, reported=handles)
    def generate(self, who, name, reported):
        self.check(who, name, reported)

    @precondition(lambda self: self.held is None and self.blocks["worker"])
    @rule(name=of_family(held), module=modules, before=st.booleans())
    def hold(self, name, module, before):
        """The worker stops in the middle of a use, within its block, until it is asked for something else."""
        paused, state = [], self.in_force("worker")
        if name == "fixed layout" and state.config is None or self.offloaded and self._is_amid_weights(module):
            return

        def pause(*_):
            if not paused and threading.current_thread() is self.worker._thread:
                paused.append(True)
                self.worker.pause()

        hook = self._hook(module, before, pause)
        got = self.worker.do(self.asking(name, state))
        if not paused:  # it does not come by there
            hook.remove()
            self.compare(got, name, state)
            return

        def go_on():
            self.held = None
            got = self.worker.resume()
            hook.remove()
            self.compare(got, name, state)

        self.held = go_on

    def let_go(self) -> None:
        if self.held is not None:
            self.held()

    def _is_amid_weights(self, module: int) -> bool:
        """In the midst of a module with weights of its own: accelerate takes them off after another thread's use."""
        names = [name for name, _ in self.model.named_modules()]
        parts = names[module % len(names)].split(".")
        around = (self.model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
        return any(next(owner.parameters(recurse=False), None) is not None for owner in around)

    def _hook(self, module: int, before: bool, hook: Callable) -> Any:
        places = list(self.model.modules())
        place = places[module % len(places)]
        return place.register_forward_pre_hook(hook) if before else place.register_forward_hook(hook)

    @rule(
        who=threads, name=of_family(interrupted), error=errors, module=modules, before=st.booleans(),
        after=st.sampled_from((0, 0, 1, 2)), then=st.sampled_from((None, "text", "parent")),
    )  # fmt: skip
    def interrupt(self, who, name, error, module, before, after, then):
        """An error at any module of the model, at its first run or a later one."""
        self.let_go()
        state, times = self.in_force(who), count()
        if name == "fixed layout" and state.config is None:
            return

        def strike(*_):
            if next(times) == after:
                raise error("on purpose")

        with self._hook(module, before, strike):
            if name == "own cache":
                self._run_on_a_cache(error)
            else:
                self._run_or_be_struck(who, name, state, error)
        if then in self.uses:
            self.check(who, then)

    def _run_or_be_struck(self, who, name, state, error):
        try:
            got = self.do(who, self.asking(name, state))
        except error as struck:
            assert str(struck) == "on purpose"
        else:  # it does not come by there so often
            self.compare(got, name, state)

    def _run_on_a_cache(self, error):
        """A failed forward holds on to nothing: the cache goes with its last owner."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        alive = weakref.ref(cache)
        with suppress(error), torch.no_grad():
            self.model(**calls.batch_of(self.family, "left"), past_key_values=cache, use_cache=True)
        del cache
        if alive() is not None:
            gc.collect()
        assert alive() is None

    # -------------------------------------------------------------------------------- on a cache

    @rule(target=caches, who=threads, batch=st.sampled_from(list(BATCHES)))
    def prefill(self, who, batch):
        config = self.in_force(who).config
        logits, cache = self.do(who, lambda: calls.prefill(self.model, self.family, batch))
        self._compare_logits(logits, calls.continued(self.family, config, batch, 0, ()))
        mask = calls.batch_of(self.family, batch)["attention_mask"]
        return Kept(config, batch, cache, mask, [(sample, ()) for sample in range(len(mask))])

    @rule(kept=caches, who=threads, word=words, length=st.integers(1, 2))
    def decode(self, kept, who, word, length):
        """One or two words more, others in every row, under the config of the prefill."""
        if len(kept.rows[0][1]) > 3 or length > 1 and not calls.bears_several_words(self.family):
            return
        ids = [[WORDS[(word + row + place) % len(WORDS)] for place in range(length)] for row in range(len(kept.rows))]
        kept.mask = torch.cat((kept.mask, kept.mask.new_ones(len(ids), length)), 1)
        with self._under(who, kept.config):
            logits = self.do(who, lambda: calls.decode(self.model, kept.cache, torch.tensor(ids), kept.mask))
        for row, (sample, before) in enumerate(kept.rows):
            for place in range(length):
                history = (*before, *ids[row][: place + 1])
                want = calls.continued(self.family, kept.config, kept.batch, kept.cropped, history)
                self._compare_logits(logits[row, place], want[sample])
            kept.rows[row] = sample, (*before, *ids[row])

    @contextmanager
    def _under(self, who: str, config: str | None) -> Iterator[None]:
        """Within a block of its own, if another config is in force."""
        if self.in_force(who).config == config:
            yield
            return
        manager = fastmmoe.enabled(self.model, self.configs[config or "random"])
        self.do(who, manager.__enter__)
        try:
            if config is None:
                self.do(who, lambda: fastmmoe.disable(self.model))
            yield
        finally:
            self.do(who, lambda: manager.__exit__(None, None, None))

    def _compare_logits(self, got: torch.Tensor, want: torch.Tensor) -> None:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=self.tolerance)

    @precondition(lambda self: calls.bears_rows(self.family))
    @rule(
        kept=caches, order=st.permutations(range(4)), how=st.sampled_from(("reorder", "beams", "select", "repeat")),
        then=st.none() | words,
    )  # fmt: skip
    def move_rows(self, kept, order, how, then):
        rows = [row for row in order if row < len(kept.rows)]
        if how == "repeat":
            if len(rows) > 2:
                return
            rows = [row for row in range(len(rows)) for _ in range(2)]
            kept.cache.batch_repeat_interleave(2)
        elif how == "select":
            rows = rows[: 1 + order[0]]
            kept.cache.batch_select_indices(torch.tensor(rows))
        else:
            if how == "beams":  # all follow one
                rows = [rows[0]] * len(rows)
            kept.cache.reorder_cache(torch.tensor(rows))
        kept.mask, kept.rows = kept.mask[rows], [kept.rows[row] for row in rows]
        self._then_decode(kept, then)

    @precondition(lambda self: calls.bears_rows(self.family))
    @rule(kept=caches, tokens=st.integers(1, 3), then=st.none() | words)
    def crop(self, kept, tokens, then):
        """Words, and up to two tokens of the prompt's last text."""
        words = min(tokens, len(kept.rows[0][1]))
        # with padding on the right, the last tokens are not those of all samples
        most = 2 - kept.cropped if BATCHES[kept.batch][1] == "left" else 0
        cropped = min(tokens - words, most)
        if words + cropped:
            kept.cache.crop(-(words + cropped))
            kept.mask = kept.mask[:, : -(words + cropped)]
            kept.rows = [(sample, history[: len(history) - words]) for sample, history in kept.rows]
            kept.cropped += cropped
            self._then_decode(kept, then)

    def _then_decode(self, kept, word):
        if word is not None:
            self.decode(kept, "main", word, 1)

    @precondition(lambda self: calls.bears_rows(self.family))
    @rule(target=caches, kept=caches, pickled=st.booleans())
    def duplicate(self, kept, pickled):
        """Both are used from here on."""
        cache = pickle.loads(pickle.dumps(kept.cache)) if pickled else copy.deepcopy(kept.cache)
        return replace(kept, cache=cache, rows=list(kept.rows))

    # -------------------------------------------------------------------------------- other hands on the model

    @precondition(lambda self: not self.offloaded)
    @rule(who=anyone, handle=st.sampled_from(("model", "wrapper")), config=configs)
    def take_a_copy(self, who, handle, config):
        """The copy is a stock model that can be enabled itself; the original does not notice."""
        self.let_go()

        def copied():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return copy.deepcopy(self.handles[handle])

        other = self.do(who, copied)
        other = other.wrapped if handle == "wrapper" else other
        assert traces(other, self.family, self.is_wrapped) == []

        def ask(config):
            use = self.uses["left"]
            reported = other if config is not None else None
            got = self.do(who, lambda: calls.answer(other, self.family, use.run, reported))
            self.compare(got, "left", State(config))

        ask(None)
        fastmmoe.enable(other, self.configs[config])
        ask(config)
        self.probe("one")
        fastmmoe.disable(other)
        ask(None)

    @precondition(lambda self: self.kind == "offload" and not self.was_offloaded)
    @rule(probe=probes)
    def offload(self, probe):
        from accelerate import cpu_offload

        self.let_go()
        self.is_wrapped = self._is_enabled()
        cpu_offload(self.model, execution_device="cpu")
        self.offloaded = self.was_offloaded = True
        self.probe(probe)

    @precondition(lambda self: self.offloaded)
    @rule(probe=probes)
    def bring_back(self, probe):
        from accelerate.hooks import remove_hook_from_submodules

        self.let_go()
        self.is_wrapped |= self._is_enabled()
        remove_hook_from_submodules(self.model)
        self.offloaded = False
        self.probe(probe)

    def _is_enabled(self) -> bool:
        """Anywhere, in force or not."""
        states = [self.base, *(block.state for blocks in self.blocks.values() for block in blocks)]
        return any(state.config is not None for state in states)

    @precondition(lambda self: self.kind == "compiled layers" and self.compiled < 2)
    @rule(who=threads, layer=st.integers(0, 5), name=st.sampled_from(("left", "mixed", "greedy")))
    def compile_a_layer(self, who, layer, name):
        self.let_go()
        self.compiled += 1
        layers = calls.layers_of(self.model, self.family)
        module = layers[layer % len(layers)]
        state = self.in_force(who)
        with dynamo():
            module.compile(backend="eager")
            try:
                got = self.do(who, self.asking(name, state))
            finally:
                vars(module).pop("_compiled_call_impl")
        self.compare(got, name, state, exact=False)

    def _may_compile(self) -> bool:
        """Once, and where it takes part in something."""
        return self.kind == "compiled" and not self.compiled and self.base.config not in (None, "nothing")

    @precondition(_may_compile)
    @rule(who=threads)
    def compile_the_model(self, who):
        self.let_go()
        self.compiled += 1
        state, run = self.in_force(who), self.uses["left"].run
        reported = self.model if state.config is not None else None
        with dynamo():
            got = self.do(who, lambda: calls.answer(self.handles["compiled"], self.family, run, reported))
        self.compare(got, "left", state, exact=False)

    # -------------------------------------------------------------------------------- the end

    def teardown(self):
        try:
            if sys.exc_info()[0] is None:
                self._leave_everything()
        finally:
            self.worker.end()

    def _leave_everything(self):
        """No trace is left, and the model is the stock one bit for bit."""
        self.let_go()
        if self._may_compile():
            self.compile_the_model("main")
        for who in THREADS:
            while self.blocks[who]:
                self.leave(who, 0, False, None)
        self.disable("main", "wrapper", None)
        if self.offloaded:
            self.bring_back(None)
        assert traces(self.model, self.family, self.is_wrapped) == []
        weights, before = self.model.state_dict(), calls.pristine(self.family).state_dict()
        assert weights.keys() == before.keys() and all(torch.equal(weights[name], before[name]) for name in before)
        for who in (*THREADS, "passer-by"):
            for name in ("left", "greedy"):
                self.check(who, name)
