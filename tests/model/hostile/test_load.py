"""Load: eight threads send one enabled model requests of every kind, some of which fail or are interrupted.

`FASTMMOE_LOAD_REQUESTS=1000` sends so many; a slice runs by default.
"""

import gc
import os
import queue
import random
import threading

import psutil
import pytest
import torch

import fastmmoe

from .. import calls
from ..calls import USES

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")
REQUESTS = int(os.environ.get("FASTMMOE_LOAD_REQUESTS", "80"))
THREADS = 8
KINDS = ("text", "one", "left", "right", "mixed", "four logits", "embeddings", "wrapped", "fixed layout", "two turns",
         "greedy", "greedy text", "beams")  # fmt: skip
STRUCK = (RuntimeError, MemoryError, KeyboardInterrupt, SystemExit)


class Struck:
    """Raises an error in the middle of the request under way in this thread, at the module where it has been hooked."""

    def __init__(self, model):
        self.error = threading.local()
        places = list(model.model.language_model.modules())
        for place in random.Random(0).sample(places, 6):
            place.register_forward_hook(self)

    def __call__(self, *_):
        error, self.error.value = getattr(self.error, "value", None), None
        if error is not None:
            raise error("on purpose")


def refused(model, family):
    """What is refused: a prompt that ends in a picture."""
    batch = calls.batch_of(family, "one")
    n = int(calls.is_vision(family, batch["input_ids"][0]).nonzero()[-1]) + 1
    names = [name for name in batch if batch[name].shape == batch["input_ids"].shape]
    return model(**batch | {name: batch[name][:, :n] for name in names})


def live_tensors(model, family):
    calls.answer(model, family, USES["left"].run)  # of the last prefill the report is kept
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize("config", ["both", "sparsevlm"])
def test_many_threads_on_one_model(family, config):
    family = {"deepseek": "deepseek_vl2"}.get(family, family)
    want = {name: calls.wanted(family, config, name).tensors for name in KINDS}
    assert all(want.values())
    model = calls.fresh(family)
    fastmmoe.enable(model, calls.configs(family)[config])
    struck = Struck(model)
    drawn = random.Random(1)
    # one in twenty fails, every second one of those in the middle
    requests = [(drawn.choice(KINDS), drawn.choice(STRUCK) if number % 40 == 7 else None) for number in range(REQUESTS)]
    requests[27::40] = [("refused", None)] * len(requests[27::40])
    wrong, failed = [], []

    def serve(name, error):
        struck.error.value = error
        try:
            if name == "refused":
                refused(model, family)
            got = calls.answer(model, family, USES[name].run).tensors
        except BaseException as raised:
            is_ours = isinstance(raised, ValueError) if name == "refused" else str(raised) == "on purpose"
            (failed if is_ours else wrong).append((name, repr(raised)))
        else:
            if error is not None or not all(map(torch.equal, got, want[name])):
                wrong.append((name, "another answer"))

    def work(waiting):
        while True:
            try:
                serve(*waiting.get_nowait())
            except queue.Empty:
                return

    def run(part):
        waiting = queue.SimpleQueue()
        for request in part:
            waiting.put(request)
        threads = [threading.Thread(target=work, args=(waiting,)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    half = len(requests) // 2
    run(requests[:half])
    before, process = live_tensors(model, family), psutil.Process()
    memory = process.memory_info().rss
    run(requests[half:])
    assert not wrong, wrong
    assert len(failed) == len(requests[7::40]) + len(requests[27::40])
    assert live_tensors(model, family) == before
    assert process.memory_info().rss - memory < 64 * 2**20
    fastmmoe.disable(model)
    for name in ("left", "greedy"):
        got = calls.answer(model, family, USES[name].run).tensors
        assert all(map(torch.equal, got, calls.wanted(family, None, name).tensors))
