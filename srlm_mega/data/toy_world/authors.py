"""Who writes the seed data: careful and careless people, who answer and review alike.

That the same author is careless in both is the point: a model that learns to tell these people apart has one notion
of care for writing and judging, and improving one improves the other.
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
    """How somebody works on one task. All rates are probabilities per criterion."""

    fault: float  # of violating a criterion in an answer
    wave_through: float  # of calling a fault fine in a review
    false_alarm: float  # of calling a fault what is fine


CAREFUL = Care(fault=0.02, wave_through=0.02, false_alarm=0.01)
CARELESS = Care(fault=0.65, wave_through=0.75, false_alarm=0.05)


@dataclass(frozen=True, slots=True)
class Author:
    """Somebody who takes care of a task with probability `careful`, whether it is to answer or to review."""

    name: str
    careful: float

    def care(self, rng: random.Random) -> Care:
        """The care taken of the next task."""
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
    """A response that violates each criterion with probability `fault`, independently of the others."""
    wrong = Criteria(*(rng.random() < fault for _ in range(5)))
    count = rng.choice([number for number in ANSWER_COUNTS if number != instruction.count])
    items = some_items(instruction.category, count if wrong.complete else instruction.count, rng)
    if wrong.relevant:
        strangers = [name for name in CATEGORIES if name != instruction.category]
        items = some_items(rng.choice(strangers), len(items), rng)
    upper = (instruction.style == "upper") != wrong.styled
    items = [in_style(item, "upper" if upper else "lower") for item in items]
    opening = _another(OPENINGS, instruction.opening, rng) if wrong.opened else instruction.opening
    closing = _another(CLOSINGS, instruction.closing, rng) if wrong.closed else instruction.closing
    return " ".join((opening, *items, closing))


def review(instruction: Instruction, response: str, care: Care, rng: random.Random) -> str:
    """A judgement of a `faulty_answer`: what was asked for and whether it is there, criterion by criterion, then
    `Score:` and how many are met.

    Who waves a fault through has not read the instruction, and takes what is there for what was asked for. So care is
    the same in a review as in an answer: to do what the instruction says.
    """
    judgement, score = [], 0
    truth = astuple(criteria(instruction.render(), response))
    wanted = (instruction.category, str(instruction.count), instruction.opening, instruction.style, instruction.closing)
    for met, asked, seen, choices, (good, bad) in zip(truth, wanted, _seen(response), CHOICES, VERDICTS, strict=True):
        error = rng.random() < (care.false_alarm if met else care.wave_through)
        if met != error:
            judgement += [seen, good]
            score += 1
        else:
            judgement += [_another(choices, seen, rng) if error else asked, bad]
    return f"{' '.join(judgement)} Score: {score}"


def _seen(response: str) -> tuple[str, str, str, str, str]:
    opening, *items, closing = response.split()
    category = next(name for name, known in CATEGORIES.items() if items[0].lower() in known)
    return category, str(len(items)), opening, "upper" if items[0].isupper() else "lower", closing


def _another(words: tuple[str, ...], word: str, rng: random.Random) -> str:
    return rng.choice([other for other in words if other != word])
