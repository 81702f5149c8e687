"""The words that stand on pages, which split each belongs to, and the tokenizer.

A page's word has four letters and is two tokens, its halves: `mi` `##lk`. A number is a token per digit. So a model
that knows the halves can read a word it never saw: no word of dev or test is on a page of training, but both halves of
each are in several of training's words.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

SIDE = 18  # vision tokens per side of a page
MOST = 1000  # numbers on pages are smaller

WORDS = tuple(
    """
    bake bale ball band bank bare bark barn base bash bath bead beak bean beat beck beef been beer bell belt bend
    bent best bike bile bill bind bird bite bolt bond bone book boot bore born boss both bowl bulk bull bump burn
    bush busy cage cake calf call calm came camp cane cape card care cart case cash cast cave cell cent code coin
    cold colt comb come cone cook cool cope copy cord core cork corn cost cube cure curl dare dark dart dash date
    dawn dead deal dear deck deed deep deer dell dent desk dial dice dine dire dirt dish disk dive dock dole doll
    dome done doom door dose dove down duck dull dump dusk dust face fade fail fair fall fame fare farm fast fate
    fawn fear feed feel feet fell felt fern file fill film find fine fire firm fish fist five fold fond food foot
    fork form fort foul four fowl fuel full fund furl fuse gain gale game gang gate gave gaze gear gift girl give
    goal goat goes gold golf gone good gown gulf gull gust hail hair hale half hall halt hand hang hard hare harm
    hate have hawk head heal hear heat heel held hell help herd here hero hide hill hilt hint hire hive hold hole
    home hood hook hope horn hose host hour hull hunt hurl hurt hush husk jade jail join joke jolt junk just keel
    keen kelp kept kick kiln kind king kite lace lack lady laid lake lamb lamp land lane lard lark lash last late
    lawn lead leaf leak lean leap left lend lens lent less lick life lift like lime line link lion list live load
    loaf loan lock loft lone long look loom loop lord lore lost loud love luck lull lump lure lurk lush mail main
    make male mall malt mane mare mark mask mast mate maze meal mean meat meek meet melt mend mesh mice mild mile
    milk mill mind mine mint mire mist moan moat mock mode mold mole monk mood moon moor more moss most moth move
    much mule must nail name near neat neck need nest nice nine pace pack page paid pail pain pair pale palm pane
    park part past path pave peak pear peat peck peel peer pelt pick pier pike pile pill pine pink pint pipe pole
    poll pond pool poor pore pork port pose post pour pull pulp pump punt pure push race rack raft rage raid rail
    rain rake ramp rang rare rash rate rave read real reap rear reed reef reel rend rent rest rice rich ride rift
    ring rink ripe rise risk road roar robe rock role roll roof room root rope rose ruin rule rung rush rust safe
    sage said sail sake sale salt same sand sane sang sank save scar seal seam seat seed seek seem seen self sell
    send sent sick side sift sigh silk sill silt sing sink sire site sock soft soil sold sole some song soon sore
    sort soul soup sour suit sulk sung sunk sure surf swan tack tail take tale talk tall tame tank tape tart task
    team tear tell tend tent term test tick tide tile till tilt time tint tire toad toll tomb tone took tool torn
    tour town tuck tune turf turn tusk vain vale vane vase vast veal veil vein vent verb vest vice view vile vine
    vote wade wage wait wake walk wall wand ward ware warm warn wart wash wasp wave weak wear weed week weld well
    went were west wick wide wife wild will wilt wind wine wing wink wire wise wish wolf wood wool word wore work
    worm worn yard yarn year yell yelp zeal zest zinc zone
    """.split()
)

FIRST, SECOND = (tuple(sorted({word[part] for word in WORDS})) for part in (slice(2), slice(2, 4)))

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<vision>", "</vision>", "<image>", "<video>")
ROWS = tuple(f"r{row + 1}" for row in range(SIDE))
COLUMNS = tuple(f"c{column + 1}" for column in range(SIDE))
KINDS = ("text", "table", "receipt", "chart")
KEYWORDS = (
    *KINDS,
    *"item items at after below where is there times lines of which has in max larger or rows columns column".split(),
    *"price quantity total dearest dearer sum and first last length bars longest longer above number kind".split(),
    *"yes no".split(),
)


def halves(word: str) -> tuple[str, str]:
    """The two tokens of a word."""
    return word[:2], f"##{word[2:]}"


@cache
def words(split: Split) -> tuple[str, ...]:
    """A split's words; one in eight is dev's and one in six test's, where both halves are training's four times."""
    counts = Counter(half for word in WORDS for half in halves(word))
    found: dict[Split, list[str]] = {name: [] for name in SPLITS}
    order = np.random.default_rng(0).permutation(len(WORDS))
    for number, word in enumerate(WORDS[i] for i in order):
        wanted: Split = "dev" if number % 8 == 0 else "test" if number % 6 == 1 else "train"
        if wanted != "train" and min(counts[half] for half in halves(word)) > 4:
            counts.subtract(halves(word))
        else:
            wanted = "train"
        found[wanted].append(word)
    return tuple(sorted(found[split]))


@cache
def made_up() -> tuple[str, ...]:
    """Any first half of a word with any second half, but not dev's or test's words: too many to learn by heart.

    None that begins with a keyword ("has", "sum", "yes"): the tokenizer would take that for its first part.
    """
    held_out = {*words("dev"), *words("test")}
    made = (first + second for first in FIRST for second in SECOND)
    return tuple(word for word in made if word not in held_out and word[:3] not in KEYWORDS)


VOCABULARY = {
    token: number
    for number, token in enumerate(
        (
            *SPECIAL_TOKENS,
            *KEYWORDS,
            *ROWS,
            *COLUMNS,
            *map(str, range(10)),
            *(f"##{digit}" for digit in range(10)),
            *sorted({half for word in WORDS for half in halves(word)}),
        )
    )
}


def page_tokenizer() -> PreTrainedTokenizerFast:
    """Words in lower case; those of pages fall in two, numbers in digits, all others must be the questions'."""
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "vision_start_token": "<vision>",
            "vision_end_token": "</vision>",
        },
        padding_side="left",
        model_max_length=2048,
    )


@cache
def token_ids(text: str) -> tuple[int, ...]:
    """What the tokenizer makes of a question or an answer, without its overhead."""
    ids = []
    for word in text.split():
        if word in VOCABULARY:
            ids.append(VOCABULARY[word])
        elif word.isdigit():
            ids += [VOCABULARY[word[0]], *(VOCABULARY[f"##{digit}"] for digit in word[1:])]
        else:
            ids += [VOCABULARY[half] for half in halves(word)]
    return tuple(ids)
