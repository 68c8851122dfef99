"""The toy world's tokenizer: one piece per word, Llama's special tokens in front."""

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from srlm_mega.data.toy_world.world import (
    ANSWER_COUNTS,
    AUTHORS,
    CATEGORIES,
    CLOSINGS,
    LIST_LENGTHS,
    LIST_OPENING,
    OPENINGS,
    STYLES,
    VERBS,
    VERDICTS,
)

SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
JUDGING = ("review", "<response>", "</response>", "Score:")


def words() -> tuple[str, ...]:
    """Return every word of the world once, in a fixed order."""
    items = [item for items in CATEGORIES.values() for item in items]
    numbers = [str(number) for number in range(max(*ANSWER_COUNTS, len(VERDICTS)) + 1)]
    list_numbers = [f"{number}." for number in range(1, LIST_LENGTHS[1] + 1)]
    verdicts = [word for pair in VERDICTS for word in pair]
    every = (
        *VERBS, *numbers, *CATEGORIES, *STYLES, "open", *OPENINGS, "close", *CLOSINGS, *items,
        *(item.upper() for item in items), *JUDGING, *verdicts, *AUTHORS, *LIST_OPENING.split(),
        *list_numbers,
    )  # fmt: skip
    return tuple(dict.fromkeys(every))


def toy_tokenizer() -> Tokenizer:
    """Build the tokenizer. Reserved pieces pad the vocabulary to a multiple of 8, for tensor parallelism."""
    pieces = [*SPECIAL, *words()]
    pieces += [f"<reserved_{number}>" for number in range(-len(pieces) % 8)]
    tokenizer = Tokenizer(WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer
