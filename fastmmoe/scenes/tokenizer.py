"""The words of the questions as a tokenizer."""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastmmoe.scenes.pictures import CELLS, COLOURS

VISION_TOKENS = 100  # per picture: 20 x 20 patches, of which pixel shuffle joins 2 x 2

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
WORDS = (
    *(str(digit) for digit in range(10)),
    *COLOURS,
    *(f"r{row + 1}" for row in range(CELLS)),
    *(f"c{column + 1}" for column in range(CELLS)),
    *"digit digits at colour of row column in is there a how many are largest larger and ? yes no none".split(),
)
VOCABULARY = {token: index for index, token in enumerate(SPECIAL_TOKENS + WORDS)}


def scene_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, or mark, in lower case; every other word is `<unk>`."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        padding_side="left",
        model_max_length=1024,
    )


def prompt(question: str) -> str:
    """What the processor takes as `text` beside one picture."""
    return f"<IMG_CONTEXT>{question}"
