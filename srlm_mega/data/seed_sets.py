"""Disjoint seed sets of a run, drawn from a file that may be larger than memory.

Usable items go to a temporary file; a few numbers per item stay in memory. The items are then taken in the order of a
hash of seed and id, whatever their order in the file. One is skipped when its prompt is too similar to one that was
taken: the sets share no item, no text and no near-duplicate.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import orjson
import xxhash
from pydantic import ConfigDict, with_config

from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.rouge import RougePool, normalised
from srlm_mega.errors import UserError
from srlm_mega.records import Prompt, RankedReplies, SftExample, parse_line


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


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True)
class SeedItem:
    """Usable content of a message tree or a line of JSONL. `target` is the answer for IFT, None without one;
    `first_turn` holds the ranked replies to `prompt`, `later_turns` those to later turns of its conversation. `system`
    is the message before `prompt`, empty without one: many items may share it, so it does not count when items are
    compared."""

    id: str
    prompt: str
    target: str | None
    first_turn: RankedReplies | None = None
    later_turns: tuple[RankedReplies, ...] = ()
    system: str = ""

    @property
    def ranked(self) -> tuple[RankedReplies, ...]:
        """All rankings, that of the prompt itself first."""
        return self.later_turns if self.first_turn is None else (self.first_turn, *self.later_turns)

    def compared(self, ranked: RankedReplies) -> str:
        """Return the text by which one of its rankings is compared with other items."""
        return self.prompt if ranked == self.first_turn else ranked.prompt

    def merged(self, other: "SeedItem") -> "SeedItem | None":
        """Return one item of two with the same prompt, of which one has only an answer and the other only a ranking;
        None for others. The answer keeps the system message that it was given under."""
        if self.target is None:
            answered, ranked = other, self
        else:
            answered, ranked = self, other
        if answered.target is None or answered.ranked or ranked.target is not None or ranked.first_turn is None:
            return None
        return replace(answered, id=self.id, first_turn=ranked.first_turn, later_turns=ranked.later_turns)


@dataclass(frozen=True, slots=True)
class Entry:
    """The part of an item that stays in memory: its key in the drawing order, its offset in the temporary file (bytes),
    the number of ranked replies to its prompt (0: none), and whether it has rankings of later turns and a target."""

    key: int
    offset: int
    first_turn_replies: int
    has_later_turns: bool
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
            item = self._read(entry)
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

    def _spool(self, items: Iterable[SeedItem], seed: int) -> Iterable[Entry]:
        """Write the first item of each id and of each text to the file, merged with what later ones of its text have
        and it lacks. Return the entries."""
        ids: set[int] = set()
        entries: dict[int, Entry] = {}  # by text
        for item in items:
            name = xxhash.xxh3_128_intdigest(item.id.encode())
            text = xxhash.xxh3_128_intdigest(normalised(item.prompt).encode())
            if name in ids:
                self.counts["duplicate_ids"] += 1
                continue
            if text in entries:
                whole = self._read(entries[text]).merged(item)
                self._file.seek(0, os.SEEK_END)
                self.counts["duplicate_texts" if whole is None else "merged"] += 1
                if whole is None:
                    continue
                item = whole
            ids.add(name)
            entries[text] = self._write(item, seed)
        kept = entries.values()
        self.counts["usable"] = len(kept)
        self.counts["with_target"] = sum(one.has_target for one in kept)
        self.counts["with_ranking"] = sum(one.first_turn_replies > 0 for one in kept)
        self.counts["with_later_ranking"] = sum(one.has_later_turns for one in kept)
        return kept

    def _write(self, item: SeedItem, seed: int) -> Entry:
        key = xxhash.xxh3_64_intdigest(f"{seed}/{item.id}".encode())
        replies = len(item.first_turn.replies) if item.first_turn else 0
        entry = Entry(key, self._file.tell(), replies, bool(item.later_turns), item.target is not None)
        self._file.write(orjson.dumps(item, option=orjson.OPT_APPEND_NEWLINE))
        return entry

    def _read(self, entry: Entry) -> SeedItem:
        self._file.seek(entry.offset)
        return parse_line(SeedItem, self._file.readline())


def draw_sets(
    items: Iterable[SeedItem],
    section: SeedDataConfig,
    source: str,
    seed: int,
    folder: Path,
    read: Callable[[], Mapping[str, int]],
) -> SeedSets:
    """Draw the held-out sets first, then the sources of EFT, then IFT; `num_eft_sources` and `num_ift` are upper
    limits. The temporary file in `folder` is as large as the usable items. `read` returns the counts of what the items
    were read from, once they are.

    Raise UserError when a held-out set cannot be filled or nothing remains for IFT, or for what the items' source
    raises; `counts.json` in `folder` then has the counts.
    """
    try:
        drawing = SeededDraw(items, seed, section.near_duplicate_rouge_l, folder)
    except UserError:  # too many lines that cannot be used
        write_counts(read(), folder)
        raise
    # Held-out sets come first, so that the sizes of the training sets do not change what models are measured on.
    eft_eval, is_full = draw_eft_eval(drawing, section.num_eft_eval)
    validation = draw_prompts(drawing, section.num_validation, source)
    test = draw_prompts(drawing, section.num_test, source)
    eft_sources = draw_eft_sources(drawing, section.num_eft_sources)
    available = drawing.num_left(has_target)
    ift = draw_ift(drawing, section.num_ift, source)
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
    steps = (
        "duplicate_ids",
        "duplicate_texts",
        "merged",
        "usable",
        "with_target",
        "with_ranking",
        "with_later_ranking",
    )
    counts = {**read(), **{name: drawing.counts[name] for name in steps}, **drawn}
    if len(validation) < section.num_validation or len(test) < section.num_test or not ift or not is_full:
        raise UserError(too_few(section, counts, write_counts(counts, folder)))
    return SeedSets(ift, (), eft_sources, eft_eval, validation, test, (), counts)


# Counts of what a draw leaves out, in the words of a message.
LEFT_OUT = {
    "bad_lines": "lines that cannot be used (quarantine.jsonl)",
    "bad_rankings": "preferences that cannot be used (ranked_quarantine.jsonl)",
    "not_ready": "trees that are not ready for export",
    "not_english": "trees that are not English",
    "deleted": "deleted trees",
    "unreviewed": "trees that nobody reviewed",
    "failed_review": "trees that failed the review",
    "replies_not_english": "replies that are not English",
    "replies_deleted": "deleted replies",
    "replies_unreviewed": "replies that nobody reviewed",
    "replies_failed_review": "replies that failed the review",
    "replies_unranked": "replies without a rank",
    "rankings_without_preference": "preferences that prefer no answer",
    "examples_labelled_bad": "examples whose label says that they are bad",
    "duplicate_ids": "repeated trees",
    "duplicate_texts": "repeated prompts",
    "near_duplicates": "prompts like one that was drawn (seed_data.near_duplicate_rouge_l)",
}


def write_counts(counts: Mapping[str, int], folder: Path) -> Path:
    """Write counts of the seed data's steps to `counts.json`; return its path."""
    path = folder / "counts.json"
    path.write_bytes(orjson.dumps(counts, option=orjson.OPT_INDENT_2))
    return path


def too_few(section: SeedDataConfig, counts: Mapping[str, int], path: Path) -> str:
    """Return the message of a draw that failed: what there was, what was left out and why, how far the sets were
    filled."""
    files = f"{section.path} has" if section.ranked_path is None else f"{section.path} and {section.ranked_path} have"
    asked = ("num_eft_eval", "num_validation", "num_test")
    sizes = ", ".join(f"seed_data.{name}={value}" for name, value in section.model_dump(include=set(asked)).items())
    left_out = (
        "; ".join(f"{words}: {counts[name]}" for name, words in LEFT_OUT.items() if counts.get(name)) or "nothing"
    )
    return (
        f"{files} {counts['usable']} usable prompts, {counts['with_ranking']} of them with ranked replies: too few for "
        f"{sizes} (the first counts replies) and seed_data.num_eft_sources={section.num_eft_sources} with answered "
        f"prompts ({counts['with_target']}) left for IFT.\n"
        f"  left out: {left_out}\n"
        f"  drawn: {counts['eft_eval_items']} of {section.num_eft_eval} replies to measure the judge, "
        f"{counts['validation']} of {section.num_validation} prompts for validation, {counts['test']} of "
        f"{section.num_test} for the test, {counts['eft_sources']} rankings for EFT, {counts['ift']} examples of IFT\n"
        f"Lower them, or give a larger file. All counts are in {path}"
    )


def has_target(entry: Entry) -> bool:
    """Tell whether an item can be an IFT example."""
    return entry.has_target


def draw_eft_eval(drawing: SeededDraw, num_items: int) -> tuple[tuple[RankedReplies, ...], bool]:
    """Draw ranked first turns with `num_items` replies in total, or as close below as sizes allow; return whether there
    were enough, too."""
    drawn: list[RankedReplies] = []
    counts = drawing.counts
    for item in drawing.take(lambda entry: 0 < entry.first_turn_replies <= num_items - counts["eft_eval_items"]):
        assert item.first_turn is not None, f"{item.id}: its entry counts ranked replies"
        drawn.append(item.first_turn)
        drawing.exclude(item.prompt)
        counts["eft_eval_items"] += len(item.first_turn.replies)
        if num_items - counts["eft_eval_items"] < 2:  # a ranking has at least two replies
            return tuple(drawn), True
    too_large = drawing.num_left(lambda entry: entry.first_turn_replies > 0)
    return tuple(drawn), bool(drawn and too_large)


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
        for item in drawing.take(lambda entry: entry.first_turn_replies > 0 or entry.has_later_turns):
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
