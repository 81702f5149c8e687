"""What a server was asked to reduce: `--additional-config '{"fastmmoe": {...}}'`, checked before anything is loaded."""

from collections.abc import Mapping

import vllm
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from fastmmoe.engines.vllm.families import FAMILIES
from fastmmoe.engines.vllm.plan import Rules
from fastmmoe.families import find_preset
from fastmmoe.families.architecture import dense_layers
from fastmmoe.methods import FastMMoEConfig

logger = init_logger(f"vllm.{__name__}")

KEY = "fastmmoe"
VERSION = "0.32"  # the minor version whose inside this was tested with
SCHEDULER = "fastmmoe.engines.vllm.scheduler.image_scheduler"


def is_supported() -> bool:
    """Whether this is a vLLM that the plugin was tested with."""
    return vllm.__version__.startswith(f"{VERSION}.")


def read_config(vllm_config: VllmConfig) -> FastMMoEConfig | None:
    """The config that `additional_config` asks for, fit to the model; None without one.

    Every entry is a field of `FastMMoEConfig` in place of its value in the model's preset.

    Raises:
        TypeError, ValueError: an entry that is none, or settings that do not fit the model.
    """
    if not _is_asked_for(vllm_config):
        return None
    architecture = vllm_config.model_config.architecture
    if architecture not in FAMILIES:
        raise ValueError(f"additional_config[{KEY!r}]: supports {', '.join(FAMILIES)}, not {architecture}")
    values = vllm_config.additional_config[KEY]
    if not isinstance(values, Mapping):
        raise TypeError(f"additional_config[{KEY!r}]: expected an object of fields of FastMMoEConfig, got {values!r}")
    if values.get("expert_budget") is not None:
        raise ValueError(f"additional_config[{KEY!r}]: expert_budget is not supported in vLLM, expected null")
    try:
        return FastMMoEConfig.preset(vllm_config.model_config.hf_config, **values)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise ValueError(f"additional_config[{KEY!r}]: {error}") from error
        raise


def check_graphs(vllm_config: VllmConfig) -> None:
    """Refuse graphs of steps with prefills: their numbers of tokens are fixed, and nothing in them is looked at again.

    Raises:
        ValueError: `cudagraph_mode` has such graphs.
    """
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL:
        raise ValueError(
            f"additional_config[{KEY!r}]: not supported with cudagraph_mode {mode.name}, whose graphs hold prefills; "
            "expected FULL_AND_PIECEWISE, FULL_DECODE_ONLY, PIECEWISE or NONE"
        )


def _is_asked_for(vllm_config: VllmConfig) -> bool:
    given = vllm_config.additional_config
    return isinstance(given, Mapping) and given.get(KEY) is not None


def rules_of(vllm_config: VllmConfig) -> Rules | None:
    """The rules of this server; None where nothing is reduced."""
    config = read_config(vllm_config)
    if config is None:
        return None
    scheduler = vllm_config.scheduler_config
    budget = scheduler.max_num_batched_tokens
    budget = min(budget, scheduler.max_num_scheduled_tokens or budget)
    if not scheduler.enable_chunked_prefill:
        return Rules(config, budget)
    # every other request may take a token of the step that runs a prompt
    longest = budget - scheduler.max_num_seqs + 1
    return Rules(config, min(longest, scheduler.long_prefill_token_threshold or longest))


def check(vllm_config: VllmConfig) -> None:
    """Refuse what is not known to be right, at start-up, and put the scheduler in that keeps image prompts whole.

    Raises:
        ValueError: an option that cannot be combined; names it and what to set.
    """
    if not _is_asked_for(vllm_config):
        _warn_of_misplaced(vllm_config)
        return
    if not is_supported():
        raise ValueError(f"additional_config[{KEY!r}]: supports vLLM {VERSION}, this is {vllm.__version__}")
    config = read_config(vllm_config)
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    reduces = config.vision_top_k is not None
    obstacles = {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--data-parallel-size": parallel.data_parallel_size > 1,
        "--enable-expert-parallel": parallel.enable_expert_parallel,
        "--enable-eplb": parallel.enable_eplb,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--enable-dbo": parallel.enable_dbo,
        "--runner pooling": vllm_config.model_config.runner_type == "pooling",
        "--enable-lora": vllm_config.lora_config is not None,
        "--speculative-config": vllm_config.speculative_config is not None,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--ec-transfer-config": vllm_config.ec_transfer_config is not None,
        "--kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "--quantization": vllm_config.model_config.quantization is not None and reduces,
        "--enable-return-routed-experts": vllm_config.aux_output_config.enabled and reduces,
        "--enable-prompt-embeds": vllm_config.model_config.enable_prompt_embeds,
        "--video-pruning-rate": bool(getattr(vllm_config.model_config.multimodal_config, "video_pruning_rate", None)),
    }
    refused = [name for name, stands in obstacles.items() if stands]
    if refused:
        raise ValueError(f"additional_config[{KEY!r}]: not supported with {', '.join(refused)}; leave it out")
    check_graphs(vllm_config)
    if reduces and not current_platform.is_cpu() and vllm_config.kernel_config.moe_backend == "auto":
        vllm_config.kernel_config.moe_backend = "triton"  # its weights lie as `moe_experts` reads them
    family, text_config = find_preset(vllm_config.model_config.hf_config)
    top_k = getattr(text_config, family.top_k)
    if config.vision_top_k in (None, top_k) and all(ratio == 1.0 for ratio in config.stage_keep_ratios):
        raise ValueError(
            f"additional_config[{KEY!r}]: reduces nothing: vision_top_k={config.vision_top_k} of {top_k} and "
            f"retention={config.retention}; expected fewer experts, or a retention below 1"
        )
    dense = dense_layers(text_config)
    for layer in config.prune_layers:
        reason = "it has no experts" if layer in dense else family.why_not_prune(text_config, layer)
        if reason:
            raise ValueError(f"prune_layers={config.prune_layers}: layer {layer} cannot prune: {reason}")
    if scheduler.scheduler_cls not in (None, SCHEDULER):
        raise ValueError(
            f"additional_config[{KEY!r}]: not supported with scheduler_cls={scheduler.scheduler_cls!r}, which may run "
            f"image prompts in chunks; leave it out, or give {SCHEDULER}"
        )
    scheduler.scheduler_cls = SCHEDULER
    if not config.prune_layers:
        return
    longest, most = rules_of(vllm_config).longest, vllm_config.model_config.max_model_len
    if longest < 2:
        raise ValueError(
            f"max_num_batched_tokens={scheduler.max_num_batched_tokens}: expected more than "
            f"max_num_seqs={scheduler.max_num_seqs}, or no prompt is sure to be run in one step"
        )
    if longest < most:
        logger.warning(
            "fastmmoe: prompts of more than %d tokens may be run in chunks and are not pruned; "
            "--max-num-batched-tokens %d prunes all",
            longest,
            most + scheduler.max_num_seqs - 1,
        )


def _warn_of_misplaced(vllm_config: VllmConfig) -> None:
    """Say so where settings stand beside the entry that they belong in."""
    given = vllm_config.additional_config
    misplaced = sorted({"retention", "keep_ratios", "prune_layers", "vision_top_k"} & set(given or ()))
    if misplaced and isinstance(given, Mapping):
        logger.warning("fastmmoe: off: additional_config has %s, expected in its entry %r", ", ".join(misplaced), KEY)
