"""Authors of the toy world's seed data: careful and careless ones, who answer and review alike.

An author is equally careful in both on purpose: a model that learns to tell the authors apart has one notion of care
for writing and judging, so that improving one improves the other.
"""

import random
from dataclasses import astuple, dataclass

from srlm_mega.data.toy_world.truth import Criteria, criteria
from srlm_mega.data.toy_world.world import (
    ANSWER_COUNTS,
    AUTHORS,
    CATEGORIES,
    CLOSINGS,
    OPENINGS,
    STYLES,
    VERDICTS,
    Instruction,
    in_style,
    some_items,
)


@dataclass(frozen=True, slots=True)
class Care:
    """Error rates in one task, as probabilities per criterion."""

    fault: float  # a violated criterion in an answer
    missed_fault: float  # a fault that a review calls met
    false_alarm: float  # a met criterion that a review calls a fault


CAREFUL = Care(fault=0.02, missed_fault=0.02, false_alarm=0.01)
CARELESS = Care(fault=0.65, missed_fault=0.75, false_alarm=0.05)


@dataclass(frozen=True, slots=True)
class Author:
    """An author who is careful in a task with probability `careful`, be it to answer or to review."""

    name: str
    careful: float

    def care(self, rng: random.Random) -> Care:
        """Draw the care taken of the next task."""
        return CAREFUL if rng.random() < self.careful else CARELESS


EVERYBODY = tuple(Author(name, 1 - rank / (len(AUTHORS) - 1)) for rank, name in enumerate(AUTHORS))

CHOICES: tuple[tuple[str, ...], ...] = (
    tuple(CATEGORIES),
    tuple(str(count) for count in ANSWER_COUNTS),
    OPENINGS,
    STYLES,
    CLOSINGS,
)


def faulty_answer(instruction: Instruction, fault: float, rng: random.Random) -> str:
    """Write a response that violates each criterion with probability `fault`, independently of the others."""
    wrong = Criteria(*(rng.random() < fault for _ in range(5)))
    count = rng.choice([number for number in ANSWER_COUNTS if number != instruction.count])
    items = some_items(instruction.category, count if wrong.complete else instruction.count, rng)
    if wrong.relevant:
        others = [name for name in CATEGORIES if name != instruction.category]
        items = some_items(rng.choice(others), len(items), rng)
    upper = (instruction.style == "upper") != wrong.styled
    items = [in_style(item, "upper" if upper else "lower") for item in items]
    opening = _other_than(instruction.opening, OPENINGS, rng) if wrong.opened else instruction.opening
    closing = _other_than(instruction.closing, CLOSINGS, rng) if wrong.closed else instruction.closing
    return " ".join((opening, *items, closing))


def review(instruction: Instruction, response: str, care: Care, rng: random.Random) -> str:
    """Write a judgement of a `faulty_answer`: per criterion a word and a verdict, then `Score:` and the number of
    criteria called met.

    A missed fault names the word of the response, as if the instruction asked for it: the reviewer has not read the
    instruction. So care is the same in a review as in an answer: to do what the instruction says.
    """
    judgement, score = [], 0
    truth = astuple(criteria(instruction.render(), response))
    wanted = (instruction.category, str(instruction.count), instruction.opening, instruction.style, instruction.closing)
    found = _properties(response)
    for met, asked, seen, choices, (good, bad) in zip(truth, wanted, found, CHOICES, VERDICTS, strict=True):
        error = rng.random() < (care.false_alarm if met else care.missed_fault)
        if met != error:
            judgement += [seen, good]
            score += 1
        else:
            judgement += [_other_than(seen, choices, rng) if error else asked, bad]
    return f"{' '.join(judgement)} Score: {score}"


def _properties(response: str) -> tuple[str, str, str, str, str]:
    opening, *items, closing = response.split()
    category = next(name for name, known in CATEGORIES.items() if items[0].lower() in known)
    return category, str(len(items)), opening, "upper" if items[0].isupper() else "lower", closing


def _other_than(word: str, words: tuple[str, ...], rng: random.Random) -> str:
    return rng.choice([other for other in words if other != word])
