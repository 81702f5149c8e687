"""What attention is told of layers behind prune stages: fewer tokens in the cache, and fewer new ones.

Behind a stage a request's tokens lie compactly in the first slots of its own blocks. Position encodings are in the
cached keys already, so nothing moves and nothing is allocated.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata, subclass_attention_backend

from fastmmoe.engines.vllm.plan import Step


class StageTables:
    """One stage's tables at fixed addresses, which CUDA graphs of decode steps read.

    Attributes:
        removed: int32 [R], tokens that each row's cache lacks.
        seq_lens: int32 [R], tokens in each row's cache once the step has run.
        slots: int64 [T], slot of each new token; -1 at padding.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        rows, tokens = vllm_config.scheduler_config.max_num_seqs, vllm_config.scheduler_config.max_num_batched_tokens
        # graphs of decode steps may be padded beyond the number of requests
        rows = max(rows, vllm_config.compilation_config.max_cudagraph_capture_size or 0, tokens)
        self.removed = torch.zeros(rows, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.slots = torch.full((max(rows, tokens),), -1, dtype=torch.int64, device=device)
        self.step: Step | None = None

    def begin(self, step: Step | None, stage: int) -> None:
        """Get ready for the metadata of a step, behind so many stages."""
        self.step = step
        self.removed.zero_()
        if step is not None:
            removed = torch.from_numpy(step.removed(stage))
            self.removed[: len(removed)].copy_(_pinned(removed, self.removed.device), non_blocking=True)

    def shorten(self, stage: int, common: CommonAttentionMetadata, block_size: int) -> CommonAttentionMetadata:
        """What the stock builder would be told if the tokens that are gone had never been there."""
        rows = common.num_reqs
        torch.sub(common.seq_lens[:rows], self.removed[:rows], out=self.seq_lens[:rows])
        changed: dict[str, Any] = {
            "seq_lens": self.seq_lens[:rows],
            "_num_computed_tokens_cache": None,
            "_token_to_req_indices_cache": None,
        }
        bound = common.seq_lens_cpu_upper_bound
        if bound is not None and self.step is not None:
            bound = bound.clone()
            removed = torch.from_numpy(self.step.removed(stage))
            bound[: len(removed)] -= removed
            changed |= {"seq_lens_cpu_upper_bound": bound, "max_seq_len": int(bound.max())}
        starts, tokens = common.query_start_loc, common.num_actual_tokens
        if self.step is not None and self.step.prunes:
            host = torch.from_numpy(self.step.bounds(stage))
            starts, tokens = _pinned(host, starts.device).to(starts.device, non_blocking=True), int(host[-1])
            changed |= {
                "query_start_loc": starts,
                "query_start_loc_cpu": host,
                "num_actual_tokens": tokens,
                "max_query_len": int(self.step.lengths(stage).max()),
                "positions": None,
            }
        changed["slot_mapping"] = self._find_slots(common, starts, tokens, block_size)
        return common.replace(**changed)

    def _find_slots(
        self, common: CommonAttentionMetadata, starts: torch.Tensor, tokens: int, block_size: int
    ) -> torch.Tensor:
        rows = common.num_reqs
        token = torch.arange(tokens, device=starts.device)
        row = torch.searchsorted(starts[1 : rows + 1], token, right=True).clamp_max(rows - 1)
        # counted from the end: a row's last new token is the last of its cache
        position = (self.seq_lens[row] - starts[row + 1] + token).long()
        is_real = (token < starts[rows]) & (position >= 0)
        position = position.clamp_min(0)
        block = common.block_table_tensor[row, position // block_size].long()
        self.slots.fill_(-1)  # what is behind is padding of the model's input
        slots = self.slots[:tokens]
        if self.step is not None:  # else the cache is not to be written
            slots.copy_(torch.where(is_real, block * block_size + position % block_size, -1))
        return slots


def _pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy from pageable memory would wait for the device."""
    return host if device.type == "cpu" else host.pin_memory()


def stage_backend(backend: type[AttentionBackend], tables: StageTables, stage: int) -> type[AttentionBackend]:
    """The attention backend of layers behind so many stages: a group, and so a builder, of its own."""
    stock = backend.get_builder_cls()

    class StageBuilder(stock):
        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            short = tables.shorten(stage, common_attn_metadata, self.kv_cache_spec.block_size)
            return super().build(common_prefix_len, short, fast_build)

    StageBuilder.__name__ = f"Stage{stage}{stock.__name__}"
    return subclass_attention_backend(f"Stage{stage}", backend, StageBuilder)
