"""DeepSeek-VL2 for transformers: vision tower, projector, the image tokens' places in the text, language model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, SiglipVisionModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple

from fastmmoe.models.deepseek_vl2.configuration import DeepseekVLV2Config, DeepseekVLV2VisionConfig
from fastmmoe.models.deepseek_vl2.image_tokens import image_token_index, num_image_tokens, tokens_per_side
from fastmmoe.models.deepseek_vl2.text_model import DeepseekVLV2TextModel, TakesExpertsImplementation


class DeepseekVLV2VisionModel(TakesExpertsImplementation, SiglipVisionModel):
    """SigLIP's tower. Its pooling head is kept, because checkpoints hold one, but never run."""

    config: DeepseekVLV2VisionConfig

    def __init__(self, config: DeepseekVLV2VisionConfig):
        super().__init__(config)
        self.use_head = False


class DeepseekVLV2Projector(nn.Module):
    """r x r neighbouring patches to one feature of the language model's width."""

    def __init__(self, config: DeepseekVLV2Config):
        super().__init__()
        projector = config.projector_config
        self.ratio = projector.downsample_ratio
        self.linear_1 = nn.Linear(projector.input_dim * self.ratio**2, projector.n_embed * projector.mlp_ratio)
        self.linear_2 = nn.Linear(projector.n_embed * projector.mlp_ratio, projector.n_embed)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[tiles, g * g, C] -> [tiles, s * s, n_embed], s = ceil(g / r)."""
        grid = int(features.shape[1] ** 0.5)
        padding = -grid % self.ratio
        features = features.transpose(1, 2).unflatten(-1, (grid, grid))  # [tiles, C, g, g]
        features = F.pad(features, (0, padding, 0, padding))  # zeros at the right and the bottom
        # unfold puts a channel's r x r values side by side, the order the weights expect
        windows = F.unfold(features, kernel_size=self.ratio, stride=self.ratio).transpose(1, 2)
        return self.linear_2(F.gelu(self.linear_1(windows)))


class DeepseekVLV2PreTrainedModel(TakesExpertsImplementation, PreTrainedModel):
    config: DeepseekVLV2Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekVLV2DecoderLayer", "SiglipEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # which image goes where is read on the host
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekVLV2Model):
            for vector in (module.image_newline, module.view_separator):
                init.normal_(vector, std=vector.shape[0] ** -0.5)


class DeepseekVLV2Model(DeepseekVLV2PreTrainedModel):
    """DeepSeek-VL2 without the language model's head."""

    def __init__(self, config: DeepseekVLV2Config):
        super().__init__(config)
        self.vision_tower = DeepseekVLV2VisionModel(config.vision_config)
        self.multi_modal_projector = DeepseekVLV2Projector(config)
        self.image_newline = nn.Parameter(torch.empty(config.projector_config.n_embed))
        self.view_separator = nn.Parameter(torch.empty(config.projector_config.n_embed))
        self.language_model = DeepseekVLV2TextModel(config.language_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, images: torch.Tensor, images_spatial_crop: torch.Tensor) -> list[torch.Tensor]:
        """The token sequence of every sample's images, one [tokens, H] each (0 tokens for a text-only sample).

        Args:
            images: [B, tiles, 3, S, S]; per image its global view and its local tiles row by row, then zeros.
            images_spatial_crop: [B, images, 2], local tiles (wide, high) per image, then zeros.

        Raises:
            ValueError: shapes that do not fit each other or the model.
        """
        crops = self._crops(images, images_spatial_crop)
        counts = [sum(1 + wide * high for wide, high in sample) for sample in crops]
        if not any(counts):
            return [self.image_newline.new_empty(0, self.image_newline.shape[0])] * len(crops)
        side = self._side
        tiles = torch.cat([sample[:count] for sample, count in zip(images, counts, strict=True)])
        features = self.multi_modal_projector(self.vision_tower(pixel_values=tiles).last_hidden_state)
        table = torch.cat((features.flatten(0, 1), self.image_newline[None], self.view_separator[None]))

        sequences, first = [], 0
        for sample in crops:
            index = [torch.empty(0, dtype=torch.long)]
            for wide, high in sample:
                index.append(
                    image_token_index(wide, high, side, first, sum(counts), self.config.global_view_pos == "head")
                )
                first += 1 + wide * high
            sequences.append(table[torch.cat(index).to(table.device)])
        return sequences

    def image_lengths(self, images: torch.Tensor, images_spatial_crop: torch.Tensor) -> list[int]:
        """How many tokens the images of every sample make; arguments and errors as `get_image_features`."""
        crops = self._crops(images, images_spatial_crop)
        return [sum(num_image_tokens(wide, high, self._side) for wide, high in sample) for sample in crops]

    @property
    def _side(self) -> int:
        vision = self.config.vision_config
        return tokens_per_side(vision.image_size, vision.patch_size, self.multi_modal_projector.ratio)

    def _crops(self, images: torch.Tensor, images_spatial_crop: torch.Tensor) -> list[list[tuple[int, int]]]:
        """Per sample, the local tiles (wide, high) of its images: those in front of the first row with a zero."""
        size = self.config.vision_config.image_size
        for name, value in (("images", images), ("images_spatial_crop", images_spatial_crop)):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if images_spatial_crop.is_floating_point():
            raise TypeError(f"images_spatial_crop: expected integers, got {images_spatial_crop.dtype}")
        if images.dim() != 5 or images.shape[2:] != (3, size, size):
            raise ValueError(f"images: expected [B, tiles, 3, {size}, {size}], got {list(images.shape)}")
        if images_spatial_crop.dim() != 3 or images_spatial_crop.shape[2] != 2:
            raise ValueError(f"images_spatial_crop: expected [B, images, 2], got {list(images_spatial_crop.shape)}")
        if images.shape[0] != images_spatial_crop.shape[0]:
            raise ValueError(
                f"images_spatial_crop: expected {images.shape[0]} samples like images, got "
                f"{images_spatial_crop.shape[0]}"
            )
        crops: list[list[tuple[int, int]]] = []
        for number, rows in enumerate(images_spatial_crop.tolist()):
            if any(tiles < 0 for row in rows for tiles in row):
                raise ValueError(f"images_spatial_crop: expected numbers of tiles, got {rows} for sample {number}")
            end = next((i for i, (wide, high) in enumerate(rows) if wide == 0 or high == 0), len(rows))
            crops.append([(wide, high) for wide, high in rows[:end]])
            needed = sum(1 + wide * high for wide, high in crops[-1])
            if needed > images.shape[1]:
                raise ValueError(
                    f"images: sample {number}'s images_spatial_crop needs {needed} tiles, got {images.shape[1]}"
                )
        return crops

    def _merge_images(
        self,
        embeds: torch.Tensor,
        images: torch.Tensor,
        images_seq_mask: torch.Tensor | None,
        images_spatial_crop: torch.Tensor | None,
        images_seq_start: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write the images' tokens over embeds [B, n, H] where the mask [B, n] is true."""
        if images_spatial_crop is None:
            raise ValueError("images_spatial_crop: expected [B, images, 2] along with images, got None")
        sequences = self.get_image_features(images, images_spatial_crop)
        if not any(map(len, sequences)):
            return embeds  # text only
        if images_seq_mask is None:
            raise ValueError("images_seq_mask: expected [B, n] along with images, got None")
        if images_seq_mask.shape != embeds.shape[:2]:
            raise ValueError(f"images_seq_mask: expected {list(embeds.shape[:2])}, got {list(images_seq_mask.shape)}")
        mask = images_seq_mask.to(embeds.device, torch.bool)
        places = mask.sum(1).tolist()
        if images_seq_start is not None:
            starts = images_seq_start.tolist()
            sequences = [s[start : start + place] for s, start, place in zip(sequences, starts, places, strict=True)]
        elif len(places) == 1:
            sequences = [torch.cat(sequences)]  # of samples behind one another in a row
        for sample, (place, sequence) in enumerate(zip(places, sequences, strict=True)):
            if place != len(sequence):
                raise ValueError(
                    f"images_seq_mask: sample {sample}'s images make {len(sequence)} tokens, the mask has {place}"
                )
        features = torch.cat(sequences).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(mask.unsqueeze(-1), features)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_spatial_crop: torch.Tensor | None = None,
        images_seq_start: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """One pass over the tokens.

        Args:
            input_ids: [B, n]; or inputs_embeds, [B, n, H].
            attention_mask: [B, past + n], true at valid tokens; None: all are.
            images: [B, tiles, 3, S, S], values in [-1, 1]; None without images. One row of several samples has the
                images of them all, in order, [samples, tiles, 3, S, S].
            images_seq_mask: [B, n], true (any dtype) where an image's tokens go, in order; token ids do not matter.
            images_spatial_crop: [B, images, 2], local tiles (wide, high); all zeros: text only.
            images_seq_start: int64 [B], how many of the images' tokens came in earlier passes, where this one does not
                have all of them; None: it does.
            position_ids: [B or 1, n], may have gaps; None: 0, 1, 2, ... in every row, padding included.
            kwargs: what the language model takes besides, its cache among them.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds, or images that do not fit the mask.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if images is not None:
            inputs_embeds = self._merge_images(
                inputs_embeds, images, images_seq_mask, images_spatial_crop, images_seq_start
            )
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )


class DeepseekVLV2ForCausalLM(DeepseekVLV2PreTrainedModel, GenerationMixin):
    """DeepSeek-VL2: images and text in, text out.

    `generate` takes the same inputs as `forward`. With a cache, `images_seq_mask` covers all tokens or the new ones,
    and `images` are all of the conversation's or those that the cache does not hold; in chunks (`prefill_chunk_size`),
    where the vision tower runs again for every chunk, the mask covers all tokens. Official checkpoints come without a
    generation_config.json: give it `eos_token_id`. transformers' quanto quantizes the one tensor that it is given, and
    the official vision towers hold three in one: leave them out by
    `QuantoConfig(weights="int8", modules_to_not_convert=["model.vision_tower", "lm_head"])`.
    """

    def __init__(self, config: DeepseekVLV2Config):
        super().__init__(config)
        self.model = DeepseekVLV2Model(config)
        text = config.language_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, images: torch.Tensor, images_spatial_crop: torch.Tensor) -> list[torch.Tensor]:
        """As `DeepseekVLV2Model.get_image_features`."""
        return self.model.get_image_features(images, images_spatial_crop)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_spatial_crop: torch.Tensor | None = None,
        images_seq_start: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits of the next tokens; arguments and errors as `DeepseekVLV2Model.forward`.

        Args:
            labels: int64 [B, n], -100 where no loss is wanted.
            logits_to_keep: how many of the last positions get logits, or which positions; 0: all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            images=images,
            images_seq_mask=images_seq_mask,
            images_spatial_crop=images_spatial_crop,
            images_seq_start=images_seq_start,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.language_config.vocab_size, **kwargs)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return MoeCausalLMOutputWithPast(loss=loss, logits=logits, **others)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_spatial_crop: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Images go with the prompt: into the passes that have its tokens, and into every pass without a cache."""
        # transformers has called it by two names
        named = {"past_key_values": past_key_values, "cache": cache}
        cache = past_key_values if cache is None else cache
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            **{name: value for name, value in named.items() if value is not None},
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        past = 0 if cache is None else int(cache.get_seq_length())
        # of a prompt in chunks, transformers 5.17 calls none the first
        is_in_prompt = is_first_iteration or images_seq_mask is not None and past < images_seq_mask.shape[1]
        if images is None or use_cache and not is_in_prompt:
            return inputs
        inputs |= {"images": images, "images_spatial_crop": images_spatial_crop, "images_seq_mask": images_seq_mask}
        if images_spatial_crop is None or images_seq_mask is None:
            return inputs  # which `forward` refuses
        tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        mask, start = self._places_of_pass(images, images_seq_mask, images_spatial_crop, past, tokens.shape[1])
        is_chunk = past > 0 and images_seq_mask.shape[1] > past + tokens.shape[1]
        if is_chunk and inputs.get("input_ids") is not None and len(tokens.cpu()[mask].unique()) > 1:
            raise ValueError(
                "images_seq_mask: expected one for all tokens, those in the cache included, where a prompt comes in "
                "chunks; it is true at different tokens"
            )
        if not mask.any():
            return inputs | {"images": None}
        return inputs | {"images_seq_mask": mask.to(images_seq_mask.device), "images_seq_start": start}

    def _places_of_pass(
        self, images: torch.Tensor, mask: torch.Tensor, crop: torch.Tensor, past: int, n: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where tokens of the images go among the n that follow `past`, and how many come in front of those.

        Args:
            images, crop: of all images of the prompt, or of those whose tokens are not in the cache.
            mask: `images_seq_mask` [B, N] of the whole prompt, or of its n new tokens.

        Raises:
            ValueError: images that do not fit the mask.
        """
        if mask.dim() != 2 or len(mask) != len(images):
            raise ValueError(f"images_seq_mask: expected [{len(images)}, n] like images, got {list(mask.shape)}")
        mask = mask.bool().cpu()
        is_of_new = past > 0 and mask.shape[1] == n
        if is_of_new:
            past = 0
        if past and mask.shape[1] < past + n:
            raise ValueError(f"images_seq_mask: expected {past + n} tokens, or the {n} new ones, got {mask.shape[1]}")
        if mask.shape[1] < n:
            # without a cache the generated tokens, which are text, are passed again
            mask = F.pad(mask, (0, n - mask.shape[1]))
        lengths = torch.tensor(self.model.image_lengths(images, crop))
        if not lengths.any():
            mask = torch.zeros_like(mask)  # text only, whatever the mask says
        before, later = mask[:, :past].sum(1), mask[:, past:].sum(1)
        start = lengths - later
        for sample in range(len(mask)):
            if start[sample] < 0 or (start[sample] > before[sample] and not is_of_new):
                raise ValueError(
                    f"images_seq_mask: sample {sample}'s images make {lengths[sample]} tokens, the mask has "
                    f"{before[sample] + later[sample]}, {before[sample]} of them in the cache"
                )
        return mask[:, past : past + n], start
