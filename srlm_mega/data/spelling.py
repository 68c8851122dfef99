"""Whether a tokenizer can spell texts: what it encodes has to come back when it is decoded.

One that was made for other text, or is damaged, trains a model on unknown tokens, or on none, without any error.
"""

import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from srlm_mega.chat import Chat
from srlm_mega.errors import UserError
from srlm_mega.records import Prompt, RankedReplies, SftExample

MAX_TEXTS = 2000
SHOWN = 60  # characters of the example
Kind = Literal["empty", "unknown", "changed"]
CAUSES: dict[Kind, str] = {
    "empty": "it returns no tokens, so its tokenizer.json is damaged",
    "unknown": "it has no tokens for their words, and puts unknown ones in their place: it was made for other text",
    "changed": "they come back changed, so its normalizer or its decoder drops characters",
}


@dataclass(frozen=True)
class Fault:
    """What is wrong with a text's tokens, and the text that comes back for it."""

    kind: Kind
    back: str


def check_spelling(
    chat: Chat,
    records: Sequence[SftExample | RankedReplies | Prompt],
    limit: float,
    seed: int,
    name: str,
    of: str = "the seed data",
) -> None:
    """Raise UserError when more than this share of the texts of these records (of many a seeded sample) cannot be
    spelled; `name` says which tokenizer it is, `of` which texts."""
    texts = list(dict.fromkeys(text for record in records for text in texts_of(record) if text.strip()))
    tried = texts if len(texts) <= MAX_TEXTS else random.Random(seed).sample(texts, MAX_TEXTS)
    faults = {text: fault for text in tried if (fault := fault_in(chat, text)) is not None}
    if len(faults) > limit * len(tried):
        ((kind, _),) = Counter(fault.kind for fault in faults.values()).most_common(1)
        example, back = next((text, fault.back) for text, fault in faults.items() if fault.kind == kind)
        share = len(faults) / len(tried)
        raise UserError(
            f"{name} cannot spell {len(faults)} of {len(tried)} texts of {of} ({share:.1%}, at most "
            f"{limit:.1%} by seed_data.max_unspellable): {CAUSES[kind]}. For example {shown(example)} gives "
            f"{shown(back)}. Give the tokenizer that the model was trained with, or data in a language that it knows; "
            "seed_data.max_unspellable=1 trains on them all the same"
        )


def texts_of(record: SftExample | RankedReplies | Prompt) -> tuple[str, ...]:
    """Return all texts of a record that become tokens."""
    match record:
        case SftExample():
            return record.system, record.prompt, record.completion
        case RankedReplies():
            return record.prompt, *(reply.text for reply in record.replies)
        case Prompt():
            return record.system, record.text


def fault_in(chat: Chat, text: str) -> Fault | None:
    """Return what is wrong with a text's tokens, None when it comes back, white space and Unicode's form aside."""
    ids = chat.encode(text)
    back = chat.decode(ids)
    if not ids:
        return Fault("empty", back)
    if chat.unk_id is not None and chat.unk_id in ids:
        return Fault("unknown", back)
    return None if plain(back) == plain(text) else Fault("changed", back)


def plain(text: str) -> str:
    """Return a text for comparison, without white space."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def shown(text: str) -> str:
    """Return the beginning of a text, in quotes."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
