"""DeepSeek-VL2's processor: prompt, image placeholders, tiles and batching."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import AddedToken, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from fastmmoe.models.deepseek_vl2.configuration import DeepseekVLV2Config
from fastmmoe.models.deepseek_vl2.image_processing import DeepseekVLV2ImageProcessor

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
# in the order in which a tokenizer without them numbers them
GROUNDING_TOKENS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
CHAT_TOKENS = ("<|User|>", "<|Assistant|>")

IMAGE_PROCESSOR_FIELDS = (
    "candidate_resolutions",
    "patch_size",
    "downsample_ratio",
    "image_mean",
    "image_std",
    "normalize",
)
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")

# contents are stripped; a final, empty assistant message is where the model answers
CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}\
{%- else -%}{%- for part in content -%}\
{%- if part.type == 'image' -%}<image>\
{%- set behind = loop.nextitem.text if loop.nextitem is defined and loop.nextitem.type == 'text' else '' -%}\
{%- if not loop.last and behind == behind.lstrip() -%}{{ '\\n' }}{%- endif -%}\
{%- elif part.type == 'text' -%}{{ part.text }}\
{%- else -%}{{ raise_exception('content: expected parts of type image or text, got ' ~ part.type) }}\
{%- endif -%}\
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- set content = text_of(message.content or '') | trim -%}
{%- if message.role == 'system' and loop.first -%}{{ content }}\
{%- elif message.role in ('user', '<|User|>') -%}{{ '<|User|>: ' ~ content ~ '\\n\\n' }}\
{%- elif message.role in ('assistant', '<|Assistant|>') -%}{{ '<|Assistant|>:' ~ content }}\
{%- if content or not loop.last -%}{{ eos_token }}{%- endif -%}\
{%- else -%}{{ raise_exception('role: expected user, assistant, or system at the start, got ' ~ message.role) }}\
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|Assistant|>:' }}{%- endif -%}
"""


class DeepseekVLV2Processor(ProcessorMixin):
    """Text with `<image>` placeholders, and images, to the model's inputs.

    `apply_chat_template` renders the official prompt from messages whose content is a string with placeholders or
    a list of text and image parts. Special tokens that the tokenizer lacks are added to it.

    Args:
        image_token: the placeholder; each one becomes as many of these tokens as the image has.
        pad_token: fills up shorter samples, on the left.
        The other arguments are read and written for the official processor and have no effect here.
    """

    def __init__(
        self,
        image_processor: DeepseekVLV2ImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        image_token: str = "<image>",
        pad_token: str = PAD,
        add_special_token: bool = False,
        sft_format: str = "deepseek",
        mask_prompt: bool = True,
        ignore_id: int = -100,
        chat_template: str | None = None,
    ):
        if sft_format != "deepseek":
            raise ValueError(f"sft_format: expected deepseek, got {sft_format!r}")
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.image_token = image_token
        self.pad_token = pad_token
        self.add_special_token = add_special_token
        self.sft_format = sft_format
        self.mask_prompt = mask_prompt
        self.ignore_id = ignore_id
        self._complete_tokenizer()
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    def _complete_tokenizer(self) -> None:
        tokenizer = self.tokenizer
        for name, token in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", self.pad_token)):
            if getattr(tokenizer, name) is None:
                tokenizer.add_special_tokens({name: token})
        known = tokenizer.get_vocab()
        missing = [t for t in (self.image_token, *GROUNDING_TOKENS, *CHAT_TOKENS) if t not in known]
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in missing], special_tokens=True)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """The inputs of one sample or a batch.

        Args:
            images: as many as there are placeholders: one image, a list for one text, or a list of lists for a batch.
                With more than two in a sample none is tiled.
            text: one text or a list of them, such as `apply_chat_template` renders.
            add_special_tokens: put the bos token in front of a text that does not begin with it.
            padding, return_tensors: batches are always padded, and always torch tensors.
            padding_side: "left", as the model generates, or "right".

        Returns:
            input_ids, attention_mask int64 [B, n]; images_seq_mask bool [B, n], true at image tokens; images float32
            [B, tiles, 3, S, S] and images_spatial_crop int64 [B, images, 2], both all zeros for a sample without
            images.

        Raises:
            TypeError, ValueError: no text, videos or audio, images that do not match the placeholders, or other
                options.
        """
        if text is None or videos is not None or audio is not None:
            raise ValueError("text: expected text, with or without images; videos and audio are not supported")
        if padding not in (True, "longest"):
            raise ValueError(f"padding: expected True or longest, got {padding!r}")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side: expected left or right, got {padding_side!r}")
        texts = [text] if isinstance(text, str) else list(text)
        conversations = self._images_per_text(images, texts)
        vision = self.image_processor(conversations, return_tensors=return_tensors)
        rows = [
            self._token_ids(sample, crops[: len(sample_images)], add_special_tokens)
            for sample, sample_images, crops in zip(
                texts, conversations, vision["images_spatial_crop"].tolist(), strict=True
            )
        ]
        data = {**self._batch(rows, padding_side), **vision}
        return BatchFeature({name: data[name] for name in self.model_input_names}, tensor_type="pt")

    def _images_per_text(self, images: Any, texts: list[str]) -> list[list[Any]]:
        """One list of images per text; their numbers match the placeholders."""
        if images is None:
            conversations: list[list[Any]] = [[] for _ in texts]
        elif not isinstance(images, (list, tuple)):
            conversations = [[images]]
        elif images and all(isinstance(sample, (list, tuple)) for sample in images):
            conversations = [list(sample) for sample in images]
        elif len(texts) == 1:
            conversations = [list(images)]
        else:
            raise ValueError(f"images: expected a list of {len(texts)} lists, one for each text, got a flat list")
        if len(conversations) != len(texts):
            raise ValueError(f"images: expected {len(texts)} lists like text, got {len(conversations)}")
        for number, (sample, sample_images) in enumerate(zip(texts, conversations, strict=True)):
            placeholders = sample.count(self.image_token)
            if placeholders != len(sample_images):
                raise ValueError(
                    f"images: text {number} has {placeholders} {self.image_token} placeholders, "
                    f"got {len(sample_images)} images"
                )
        return conversations

    def _token_ids(self, text: str, crops: list[list[int]], add_special_tokens: bool) -> list[int]:
        """Ids of the text between placeholders, piece by piece, and of the images' tokens."""
        tokenizer = self.tokenizer
        ids = []
        if add_special_tokens and not text.startswith(tokenizer.bos_token):
            ids.append(tokenizer.bos_token_id)
        for number, piece in enumerate(text.split(self.image_token)):
            if number:
                ids += [self.image_token_id] * self.image_processor.num_image_tokens(*crops[number - 1])
            ids += tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def _batch(self, rows: list[list[int]], padding_side: str) -> dict[str, torch.Tensor]:
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(length - len(row), length) if padding_side == "left" else slice(len(row))
            ids[number, place] = torch.tensor(row, dtype=ids.dtype)
            mask[number, place] = 1
        return {"input_ids": ids, "attention_mask": mask, "images_seq_mask": ids == self.image_token_id}

    def to_dict(self) -> dict[str, Any]:
        """The fields of the official `processor_config.json`, those of the image processor among them."""
        values = super().to_dict()
        image_processor = values.pop("image_processor")
        return values | {name: image_processor[name] for name in IMAGE_PROCESSOR_FIELDS}

    @classmethod
    def _get_arguments_from_pretrained(cls, path: str, processor_dict: dict | None = None, **kwargs: Any) -> list:
        """The image processor, described among the processor's own fields, and the tokenizer."""
        with suppress(OSError):  # a directory may hold the processor alone
            # refuses DeepSeek-OCR, whose processor goes by the same name
            DeepseekVLV2Config.from_pretrained(path, **{k: v for k, v in kwargs.items() if k in _HUB_OPTIONS})
        fields = {name: processor_dict[name] for name in IMAGE_PROCESSOR_FIELDS if name in (processor_dict or {})}
        # official files name a tokenizer class that would replace the pre-tokenizer in tokenizer.json
        return [DeepseekVLV2ImageProcessor(**fields), PreTrainedTokenizerFast.from_pretrained(path, **kwargs)]
