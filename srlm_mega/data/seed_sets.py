"""Disjoint seed sets of a run, drawn from a file that may be larger than memory.

Usable items go to a temporary file; a few numbers per item stay in memory. The items are then taken in the order of a
hash of seed and id, whatever their order in the file. One is skipped when its prompt is too similar to one that was
taken: the sets share no item, no text and no near-duplicate.
"""

import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import orjson
import xxhash
from pydantic import ConfigDict, with_config

from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.rouge import RougePool
from srlm_mega.errors import UserError
from srlm_mega.records import Prompt, RankedReplies, SftExample, one_text, parse_line


@dataclass(frozen=True)
class SeedSets:
    """Disjoint sets; those that a source does not have are empty. EFT can be built from `eft_sources`, ranked replies.
    `counts` says what became of the source's items, step by step."""

    ift: tuple[SftExample, ...] = ()
    eft_train: tuple[SftExample, ...] = ()
    eft_sources: tuple[RankedReplies, ...] = ()
    eft_eval: tuple[RankedReplies, ...] = ()
    validation: tuple[Prompt, ...] = ()
    test: tuple[Prompt, ...] = ()
    documents: tuple[SftExample, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def with_counts_before(self, counts: Mapping[str, int]) -> "SeedSets":
        """Return the same sets, with the counts of earlier steps first."""
        return replace(self, counts={**counts, **self.counts})


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True)
class SeedItem:
    """Usable content of a message tree or a line of JSONL. `target` is the answer for IFT, None without one; `ranked`
    holds the ranked replies to `prompt` first, then those to later turns of its conversation. `system` is the message
    before `prompt`, empty without one: many items may share it, so it does not count when items are compared."""

    id: str
    prompt: str
    target: str | None
    ranked: tuple[RankedReplies, ...]
    system: str = ""

    @property
    def first_turn(self) -> RankedReplies | None:
        """Ranked replies to the prompt itself."""
        is_first = bool(self.ranked) and self.ranked[0].prompt == one_text(self.prompt, self.system)
        return self.ranked[0] if is_first else None

    def compared(self, ranked: RankedReplies) -> str:
        """Return the text by which one of its rankings is compared with other items."""
        return self.prompt if ranked == self.first_turn else ranked.prompt


@dataclass(frozen=True, slots=True)
class Entry:
    """The part of an item that stays in memory: its key in the drawing order, its offset in the temporary file (bytes),
    the number of ranked replies to its prompt (0: none), and whether it has any ranking and a target."""

    key: int
    offset: int
    first_turn_replies: int
    has_ranking: bool
    has_target: bool


class SeededDraw:
    """Deduplicated items, taken one by one in a seeded order."""

    def __init__(self, items: Iterable[SeedItem], seed: int, near_duplicate: float, folder: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # lives as long as this object
        self._entries = sorted(self._spool(items, seed), key=lambda entry: entry.key)
        self._used: set[int] = set()  # offsets of items that were taken or skipped
        self._pool = RougePool(near_duplicate)

    def take(self, suitable: Callable[[Entry], bool]) -> Iterator[SeedItem]:
        """Yield suitable untaken items whose prompts resemble no excluded text. The caller excludes what it uses."""
        for entry in self._entries:
            if entry.offset in self._used or not suitable(entry):
                continue
            self._used.add(entry.offset)
            self._file.seek(entry.offset)
            item = parse_line(SeedItem, self._file.readline())
            if self.is_near_duplicate(item.prompt):
                self.counts["near_duplicates"] += 1
            else:
                yield item

    def is_near_duplicate(self, text: str) -> bool:
        """Tell whether a text is a near-duplicate of an excluded one."""
        return self._pool.has_similar(text)

    def exclude(self, *texts: str) -> None:
        """Take nothing similar to these texts from now on."""
        for text in texts:
            self._pool.add(text)

    def num_left(self, suitable: Callable[[Entry], bool]) -> int:
        """Count the suitable items that were neither taken nor skipped."""
        return sum(entry.offset not in self._used and suitable(entry) for entry in self._entries)

    def _spool(self, items: Iterable[SeedItem], seed: int) -> Iterator[Entry]:
        """Write the first item of each id and of each text to the file, and yield its entry."""
        ids: set[int] = set()
        texts: set[int] = set()
        for item in items:
            name = xxhash.xxh3_128_intdigest(item.id.encode())
            text = xxhash.xxh3_128_intdigest(normalised(item.prompt).encode())
            if name in ids or text in texts:
                self.counts["duplicate_ids" if name in ids else "duplicate_texts"] += 1
                continue
            ids.add(name)
            texts.add(text)
            self.counts["usable"] += 1
            self.counts["with_target"] += item.target is not None
            self.counts["with_ranking"] += item.first_turn is not None
            self.counts["with_later_ranking"] += len(item.ranked) > (item.first_turn is not None)
            first_turn = len(item.first_turn.replies) if item.first_turn else 0
            key = xxhash.xxh3_64_intdigest(f"{seed}/{item.id}".encode())
            yield Entry(key, self._file.tell(), first_turn, bool(item.ranked), item.target is not None)
            self._file.write(orjson.dumps(item, option=orjson.OPT_APPEND_NEWLINE))


def draw_sets(items: Iterable[SeedItem], section: SeedDataConfig, source: str, seed: int, folder: Path) -> SeedSets:
    """Draw the held-out sets first, then the sources of EFT, then IFT; `num_eft_sources` and `num_ift` are upper
    limits. The temporary file in `folder` is as large as the usable items.

    Raise UserError when a held-out set cannot be filled or nothing remains for IFT.
    """
    drawing = SeededDraw(items, seed, section.near_duplicate_rouge_l, folder)
    # Held-out sets come first, so that the sizes of the training sets do not change what models are measured on.
    eft_eval = draw_eft_eval(drawing, section.num_eft_eval)
    validation = draw_prompts(drawing, section.num_validation, source)
    test = draw_prompts(drawing, section.num_test, source)
    eft_sources = draw_eft_sources(drawing, section.num_eft_sources)
    available = drawing.num_left(has_target)
    ift = draw_ift(drawing, section.num_ift, source)
    if len(validation) < section.num_validation or len(test) < section.num_test or not ift or eft_eval is None:
        usable, ranked = drawing.counts["usable"], drawing.counts["with_ranking"]
        asked = ("num_eft_eval", "num_validation", "num_test")
        sizes = ", ".join(f"seed_data.{name}={value}" for name, value in section.model_dump(include=set(asked)).items())
        raise UserError(
            f"{section.path} has {usable} usable prompts, {ranked} of them with ranked replies: too few for {sizes} "
            f"(the first counts replies) and seed_data.num_eft_sources={section.num_eft_sources} with answered "
            "prompts left for IFT. Lower them, or give a larger file"
        )
    drawn = {
        "near_duplicates": drawing.counts["near_duplicates"],
        "eft_eval_prompts": len(eft_eval),
        "eft_eval_items": drawing.counts["eft_eval_items"],
        "validation": len(validation),
        "test": len(test),
        "eft_sources": len(eft_sources),
        "ift_available": available,
        "ift": len(ift),
    }
    steps = ("duplicate_ids", "duplicate_texts", "usable", "with_target", "with_ranking", "with_later_ranking")
    counts = {name: drawing.counts[name] for name in steps} | drawn
    return SeedSets(ift, (), eft_sources, eft_eval, validation, test, (), counts)


def has_target(entry: Entry) -> bool:
    """Tell whether an item can be an IFT example."""
    return entry.has_target


def draw_eft_eval(drawing: SeededDraw, num_items: int) -> tuple[RankedReplies, ...] | None:
    """Draw ranked first turns with `num_items` replies in total, or as close below as sizes allow; None if too few."""
    drawn: list[RankedReplies] = []
    counts = drawing.counts
    for item in drawing.take(lambda entry: 0 < entry.first_turn_replies <= num_items - counts["eft_eval_items"]):
        assert item.first_turn is not None, f"{item.id}: its entry counts ranked replies"
        drawn.append(item.first_turn)
        drawing.exclude(item.prompt)
        counts["eft_eval_items"] += len(item.first_turn.replies)
        if num_items - counts["eft_eval_items"] < 2:  # a ranking has at least two replies
            return tuple(drawn)
    too_large = drawing.num_left(lambda entry: entry.first_turn_replies > 0)
    return tuple(drawn) if drawn and too_large else None


def draw(drawing: SeededDraw, number: int, suitable: Callable[[Entry], bool]) -> Iterator[SeedItem]:
    """Draw up to `number` items; nothing similar to their prompts is taken from then on."""
    for item in islice(drawing.take(suitable), number):
        drawing.exclude(item.prompt)
        yield item


def draw_prompts(drawing: SeededDraw, number: int, source: str) -> tuple[Prompt, ...]:
    """Draw the prompts of up to `number` items of any kind."""
    items = draw(drawing, number, lambda entry: True)
    return tuple(Prompt(f"{source}-{item.id}", item.prompt, source, item.system) for item in items)


def draw_eft_sources(drawing: SeededDraw, number: int) -> tuple[RankedReplies, ...]:
    """Draw up to `number` rankings, all of an item's turns before the next item's."""
    drawn: list[RankedReplies] = []
    if number:
        for item in drawing.take(lambda entry: entry.has_ranking):
            # Turns of one conversation resemble each other: they are compared with earlier items only.
            usable = [one for one in item.ranked if not drawing.is_near_duplicate(item.compared(one))]
            drawn += usable[: number - len(drawn)]
            drawing.exclude(item.prompt, *(item.compared(one) for one in usable))
            if len(drawn) == number:
                break
    return tuple(drawn)


def draw_ift(drawing: SeededDraw, number: int, source: str) -> tuple[SftExample, ...]:
    """Draw up to `number` prompts with their targets."""
    drawn: list[SftExample] = []
    for item in draw(drawing, number, has_target):
        assert item.target is not None, f"{item.id}: its entry has a target"
        drawn.append(SftExample(f"{source}-{item.id}", "ift", item.prompt, item.target, source, item.system))
    return tuple(drawn)


def normalised(text: str) -> str:
    """Return a text for comparison: letters and digits only, no case, single spaces; unchanged if nothing is left."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(character if character.isalnum() else " " for character in plain).split()
    return " ".join(words) or text
