"""What cannot be combined is refused when vLLM starts, before anything is loaded: the option is named."""

import pytest
from vllm.engine.arg_utils import EngineArgs

from fastmmoe.engines.vllm.families import FAMILIES
from fastmmoe.engines.vllm.options import SCHEDULER, read_config, rules_of

BOTH = {"retention": 0.4, "prune_layers": [2, 4, 6]}
EXPERTS = {"vision_top_k": 2}


@pytest.fixture(autouse=True)
def only_cpus(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture
def configure(checkpoint):
    def make(reduction=None, name="qwen3_vl_moe", **options):
        additional = {} if reduction is None else {"additional_config": {"fastmmoe": reduction}}
        sizes = {"max_model_len": 512, "max_num_batched_tokens": 1024, "max_num_seqs": 8, "enforce_eager": True}
        arguments = EngineArgs(str(checkpoint(name)), dtype="float32", **(sizes | additional | options))
        return arguments.create_engine_config()

    return make


def test_off_unless_asked_for(configure):
    config = configure()
    assert read_config(config) is None and rules_of(config) is None
    assert config.scheduler_config.scheduler_cls is None


def test_other_entries_of_additional_config_are_left_alone(configure):
    assert read_config(configure(additional_config={"another": 1})) is None


def test_fields_take_the_place_of_the_preset(configure):
    config = configure(BOTH | {"merge_ratio": 0.1})
    found = read_config(config)
    assert (found.vision_top_k, found.prune_layers, found.retention, found.merge_ratio) == (2, (2, 4, 6), 0.4, 0.1)
    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert rules_of(config).longest == 1024 - 8 + 1


def test_fewer_experts_alone(configure):
    config = configure(EXPERTS)
    assert config.scheduler_config.scheduler_cls == SCHEDULER and read_config(config).prune_layers == ()


def test_settings_beside_their_entry_are_said(configure, caplog):
    assert read_config(configure(additional_config={"retention": 0.5, "another": 1})) is None
    assert "off: additional_config has retention, expected in its entry 'fastmmoe'" in caplog.text


def test_preset_of_the_family(configure):
    found = read_config(configure({"retention": 0.5}))
    assert found.retention == 0.5 and found.vision_top_k == 2 and len(found.prune_layers) == 3


def test_longest_prompt_of_a_long_prefill_threshold(configure):
    assert rules_of(configure(BOTH, long_prefill_token_threshold=300)).longest == 300


def test_other_versions_of_vllm(configure, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    configure()
    with pytest.raises(Exception, match="supports vLLM 0.32, this is 0.33.0"):
        configure(BOTH)


def test_an_expert_budget_is_refused(configure):
    with pytest.raises(Exception, match="expert_budget is not supported in vLLM"):
        configure(BOTH | {"expert_budget": 8})


def test_other_architectures(configure, monkeypatch):
    monkeypatch.delitem(FAMILIES, "Qwen3VLMoeForConditionalGeneration")
    configure()
    with pytest.raises(Exception, match="supports InternVL.*, not Qwen3VLMoeForConditionalGeneration"):
        configure(BOTH)


@pytest.mark.parametrize(
    "reduction, said",
    [
        (7, "additional_config['fastmmoe']: expected an object"),
        ({"retain": 0.5}, "retain"),
        ({"retention": 1.5}, "retention: expected a number in (0, 1]"),
        ({"retention": "half"}, "retention: expected"),
        (BOTH | {"vision_top_k": 5}, "vision_top_k=5: expected at most the model's 4"),
        ({"retention": 0.5, "prune_layers": [2, 8]}, "the model has 8 layers"),
        ({"vision_top_k": None}, "reduces nothing: vision_top_k=None of 4 and retention=1.0"),
        ({"vision_top_k": 4, "prune_layers": [2]}, "reduces nothing"),
        ({"prune_layers": [4, 2], "retention": 0.5}, "prune_layers: expected layers in rising order"),
    ],
)
def test_bad_settings(configure, reduction, said):
    with pytest.raises(Exception) as error:
        configure(reduction)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"data_parallel_size": 2}, "--data-parallel-size"),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 2}, "--enable-expert-parallel"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"runner": "pooling", "convert": "embed"}, "--runner pooling"),
        ({"compilation_config": {"cudagraph_mode": "FULL"}, "enforce_eager": False}, "cudagraph_mode FULL"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "--speculative-config",
        ),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler_cls"),
        ({"max_num_batched_tokens": 512, "max_num_seqs": 512, "max_model_len": 512}, "max_num_batched_tokens=512"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate"),
    ],
)
def test_options_that_cannot_be_combined(configure, options, named):
    configure(None, **options)  # it is ours that is refused
    with pytest.raises(Exception) as error:
        configure(BOTH, **options)
    assert named in str(error.value)
