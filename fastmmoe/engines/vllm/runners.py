"""How each of vLLM's model runners tells of its step before the attention's metadata is made.

The V2 runner asks the model for a `ModelState`: nothing is patched. The V1 runner, which serves where Triton does not
run, has no such place: one of its methods is wrapped.
"""

from functools import wraps
from typing import Any

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class ReducedModelState(DefaultModelState):
    """Of the V2 runner."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._reduction = self.model.reduction

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        length = len(new_req_data.prompt_token_ids or new_req_data.prefill_token_ids)
        self._reduction.requests.add(
            new_req_data.req_id, length, new_req_data.mm_features, new_req_data.sampling_params
        )

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._reduction.requests.remove(req_id)

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._reduction.begin(
            self._reduction.requests.step(
                input_batch.req_ids, input_batch.num_computed_tokens_np, input_batch.num_scheduled_tokens
            )
        )
        return super().prepare_attn(input_batch, *args, **kwargs)


def wrap_v1_runner() -> None:
    """Let the V1 runner tell a reduced model of its step. Once per process; other models do not notice."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    stock = GPUModelRunner._build_attention_metadata
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def build(runner: GPUModelRunner, *args: Any, num_scheduled_tokens: dict[str, int] | None = None, **kwargs: Any):
        reduction = getattr(runner.model, "reduction", None)
        if reduction is not None:
            reduction.begin(_step_of(runner, reduction, num_scheduled_tokens))
        return stock(runner, *args, num_scheduled_tokens=num_scheduled_tokens, **kwargs)

    GPUModelRunner._build_attention_metadata = build


def _step_of(runner: Any, reduction: Any, new: dict[str, int] | None) -> Any:
    if new is None:  # profiling, or capturing a graph
        return None
    batch, requests = runner.input_batch, reduction.requests
    requests.keep(runner.requests)
    names = batch.req_ids
    for name in names:
        state = runner.requests[name]
        if not requests.knows(name, state):
            requests.add(name, state.num_prompt_tokens, state.mm_features, state.sampling_params, state)
    computed = batch.num_computed_tokens_cpu[: len(names)]
    return requests.step(names, computed, [new[name] for name in names])
