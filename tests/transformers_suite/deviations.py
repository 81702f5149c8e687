"""What does not pass, and why. A failing test that is not listed fails the suite, as does a listed one that passes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Deviation:
    """Tests whose "MODEL_RUN.test" matches one of the patterns (`*` is anything), and which fail with this error.

    Attributes:
        error: a regular expression.
    """

    tests: tuple[str, ...]
    error: str
    why: str


DEVIATIONS = (
    Deviation(
        ("*.test_generation_tester_mixin_inheritance",),
        "the tester must inherit from `GenerationTesterMixin`",
        "with and without FastMMoE: the source distribution does not hold the tests of `generate` that it asks for",
    ),
    Deviation(
        (
            "*_OurExperts.test_enable_input_require_grads_with_gradient_checkpointing",
            "*_OurExperts.test_retain_grad_hidden_states_attentions",
            "*_OurExperts.test_training*",
            "Qwen3Moe_OurExperts.test_problem_types",
        ),
        "moe_experts has no backward pass: it is for inference only",
        "by design: the kernels are for inference, and these tests go backward",
    ),
    Deviation(
        (
            "*_Nothing*.test_capture_outputs_decorator",
            "Qwen3VLMoe_Nothing*.test_output_router_logits_from_config",
        ),
        "output_router_logits: not supported while FastMMoE is enabled",
        "by design: refused while enabled (README, Limits)",
    ),
    Deviation(
        ("*_NothingPruned.test_reverse_loading_mapping",),
        "prune_layers: layer 0 is not a MoE layer",
        "by design: the test makes layer 0 dense, where this run has a stage, and a stage needs a gate",
    ),
)
