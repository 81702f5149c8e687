"""The models, as transformers' tests ask for them: a tiny config, and inputs that go with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import SkipTest

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLVisionConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForQuestionAnswering,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeForTokenClassification,
    Qwen3MoeModel,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeModel,
    set_seed,
)

from .upstream import ModelTesterMixin

IMAGE, VIDEO, START, END = 10, 11, 12, 13  # low, for some tests cut the vocabulary
FIRST_WORD, LAST_WORD = 20, 79
TEXT = dict(
    vocab_size=99,
    initializer_range=0.1,  # experts that matter
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


class Tester:
    """What every one says of its model; a subclass adds the config and the inputs."""

    is_training = True
    batch_size = 7  # up to which one of the tests fills a batch, with words
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    text_config = TEXT
    before, vision, after = 3, 0, 4  # words, vision tokens, words

    @property
    def seq_length(self) -> int:
        return self.before + self.vision + self.after

    def get_config(self) -> PreTrainedConfig:
        raise NotImplementedError

    def pictures(self) -> dict[str, torch.Tensor]:
        """One for each sample."""
        return {}

    def input_ids(self) -> torch.Tensor:
        """[B, n], with a run of image tokens between the words."""
        ids = torch.randint(FIRST_WORD, LAST_WORD + 1, (self.batch_size, self.seq_length))
        ids[:, self.before : self.before + self.vision] = IMAGE
        return ids

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        ids = self.input_ids()
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.pictures()


class Qwen3MoeTester(Tester):
    def get_config(self) -> PreTrainedConfig:
        return Qwen3MoeConfig(**TEXT)


class InternVLTester(Tester):
    """InternVL, whose text model is a Qwen3-MoE."""

    vision = 16
    vision_config = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[32, 32],
        patch_size=[4, 4],
    )

    def get_config(self) -> PreTrainedConfig:
        return InternVLConfig(
            vision_config=InternVLVisionConfig(**self.vision_config),
            text_config=Qwen3MoeConfig(**TEXT),
            image_token_id=IMAGE,
            image_seq_length=self.vision,
            downsample_ratio=0.5,
        )

    def pictures(self) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.rand(self.batch_size, 3, 32, 32)}


class Qwen3VLMoeTester(Tester):
    """Pictures of 8 x 8 patches, of which 2 x 2 make a token."""

    vision = 16
    vision_config = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        patch_size=4,
        temporal_patch_size=2,
        spatial_merge_size=2,
        out_hidden_size=32,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    )

    def get_config(self) -> PreTrainedConfig:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        return Qwen3VLMoeConfig(
            vision_config=self.vision_config,
            text_config=TEXT | {"rope_parameters": rope},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )

    def input_ids(self) -> torch.Tensor:
        ids = super().input_ids()
        ids[:, self.before - 1], ids[:, self.before + self.vision] = START, END
        return ids

    def pictures(self) -> dict[str, torch.Tensor]:
        token_types = torch.zeros(self.batch_size, self.seq_length, dtype=torch.long)
        token_types[:, self.before : self.before + self.vision] = 1
        return {
            "pixel_values": torch.rand(self.batch_size * 64, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 8, 8]] * self.batch_size),
            "mm_token_type_ids": token_types,
        }


class ModelTests(ModelTesterMixin):
    """The same numbers in every run."""

    model_tester_class: type[Tester]
    ran_ours = False

    def setUp(self) -> None:
        super().setUp()
        set_seed(0)
        self.model_tester = self.model_tester_class()

    def _prepare_for_class(self, inputs_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        # one of the tests hands on the prompt without its pictures
        missing = self.model_tester.pictures() if "input_ids" in inputs_dict else {}
        return super()._prepare_for_class(missing | inputs_dict, *args, **kwargs)

    @contextmanager
    def subTest(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """A part that fails is the test's failure; one that is skipped is that part's alone, as in unittest."""
        try:
            yield
        except SkipTest:
            pass


class Qwen3Moe(ModelTests):
    model_tester_class = Qwen3MoeTester
    all_model_classes = (
        Qwen3MoeModel,
        Qwen3MoeForCausalLM,
        Qwen3MoeForSequenceClassification,
        Qwen3MoeForTokenClassification,
        Qwen3MoeForQuestionAnswering,
    )
    test_all_params_have_gradient = False  # not every expert is chosen


class InternVL(ModelTests):
    model_tester_class = InternVLTester
    all_model_classes = (InternVLForConditionalGeneration, InternVLModel)
    _is_composite = True
    test_all_params_have_gradient = False


class Qwen3VLMoe(ModelTests):
    model_tester_class = Qwen3VLMoeTester
    all_model_classes = (Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeModel)
    _is_composite = True
    test_all_params_have_gradient = False

    def test_reverse_loading_mapping(self) -> None:
        # its checkpoints have the same names, and transposed experts
        super().test_reverse_loading_mapping(check_keys_were_modified=False)
