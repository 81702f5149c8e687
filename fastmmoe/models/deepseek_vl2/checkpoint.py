"""Official parameter names and layouts to this package's and back, for `from_pretrained` and `save_pretrained`."""

from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from fastmmoe.models.deepseek_vl2.configuration import DeepseekVLV2Config
from fastmmoe.models.deepseek_vl2.modeling import DeepseekVLV2VisionModel


class _OneTensor(ConversionOps):
    """An operation on a single tensor, which is given alone or as a list of one."""

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs):
        (tensor,) = input_dict.values()
        return {target_patterns[0]: self.apply(tensor[0] if isinstance(tensor, list) else tensor)}


class DropBatch(_OneTensor):
    """[1, N, C] -> [N, C]."""

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.squeeze(0)

    @property
    def reverse_op(self) -> ConversionOps:
        return AddBatch()


class AddBatch(_OneTensor):
    """[N, C] -> [1, N, C]."""

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)

    @property
    def reverse_op(self) -> ConversionOps:
        return DropBatch()


class JoinQueryKeyValue(Concatenate):
    """query [C, ...] and key-value [2 C, ...] -> [3 C, ...]."""

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitQueryKeyValue()


class SplitQueryKeyValue(ConversionOps):
    """[3 C, ...] -> query [C, ...] and key-value [2 C, ...]."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs):
        (tensor,) = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        width = tensor.shape[0] // 3
        pieces = tensor.split([width, 2 * width])
        return {name: piece.contiguous() for name, piece in zip(target_patterns, pieces, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinQueryKeyValue(0)


def _whole_model() -> list[WeightRenaming | WeightConverter]:
    return [
        WeightRenaming(r"^language\.lm_head\.", r"^lm_head\."),
        WeightRenaming(r"^language\.model\.", r"^model\.language_model\."),
        WeightRenaming(r"^vision\.", r"^model\.vision_tower\."),
        WeightRenaming(r"^projector\.layers\.0\.", r"^model\.multi_modal_projector\.linear_1\."),
        WeightRenaming(r"^projector\.layers\.2\.", r"^model\.multi_modal_projector\.linear_2\."),
        WeightRenaming(r"^image_newline", r"^model\.image_newline"),
        WeightRenaming(r"^view_seperator", r"^model\.view_separator"),
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]


def _vision_tower() -> list[WeightRenaming | WeightConverter]:
    # relative to the tower: unscoped, saving would also join the language model's query, key and value
    return [
        WeightRenaming(r"^patch_embed\.proj\.", r"^embeddings\.patch_embedding\."),
        WeightRenaming(r"^blocks\.", r"^encoder\.layers\."),
        WeightRenaming(r"\.norm1\.", r"\.layer_norm1\."),
        WeightRenaming(r"\.norm2\.", r"\.layer_norm2\."),
        WeightRenaming(r"\.attn\.proj\.", r"\.self_attn\.out_proj\."),
        WeightRenaming(r"^norm\.", r"^post_layernorm\."),
        WeightRenaming(r"^attn_pool\.latent", r"^head\.probe"),
        WeightRenaming(r"^attn_pool\.proj\.", r"^head\.attention\.out_proj\."),
        WeightRenaming(r"^attn_pool\.norm\.", r"^head\.layernorm\."),
        WeightRenaming(r"^attn_pool\.mlp\.", r"^head\.mlp\."),
        WeightConverter("pos_embed", "embeddings.position_embedding.weight", operations=[DropBatch()]),
        WeightConverter(
            "attn.qkv", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], operations=[Chunk(dim=0)]
        ),
        *(
            WeightConverter(
                [f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}"],
                f"head.attention.in_proj_{kind}",
                operations=[JoinQueryKeyValue(0)],
            )
            for kind in ("weight", "bias")
        ),
    ]


register_checkpoint_conversion_mapping(DeepseekVLV2Config.model_type, _whole_model())
register_checkpoint_conversion_mapping(DeepseekVLV2VisionModel.__name__, _vision_tower())
