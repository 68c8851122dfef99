"""Who writes the seed data: careful and careless people, who answer and review alike.

That the same author is careless in both is the point: a model that learns to tell these people apart has one notion
of care for writing and judging, and improving one improves the other.
"""

import random
from dataclasses import astuple, dataclass

from srlm_mega.data.toy_world.truth import Criteria, criteria
from srlm_mega.data.toy_world.world import (
    ANSWER_COUNTS,
    CATEGORIES,
    CLOSINGS,
    OPENINGS,
    PERSONAS,
    STYLES,
    VERDICTS,
    Instruction,
    in_style,
    some_items,
)


@dataclass(frozen=True, slots=True)
class Author:
    """How often somebody errs. All rates are probabilities per criterion."""

    name: str
    fault: float  # of violating a criterion in an answer
    wave_through: float  # of calling a fault fine in a review
    false_alarm: float  # of calling a fault what is fine


EXPERT = Author(PERSONAS[0], fault=0.02, wave_through=0.02, false_alarm=0.01)
NOVICE = Author(PERSONAS[1], fault=0.65, wave_through=0.75, false_alarm=0.05)


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


def review(instruction: Instruction, response: str, author: Author, rng: random.Random) -> str:
    """The author's judgement of a `faulty_answer`: what is seen in it and a verdict, criterion by criterion, then
    `Score:` and how many are met. Who waves a fault through has not looked, and names what was asked for."""
    judgement, score = [], 0
    truth = astuple(criteria(instruction.render(), response))
    for met, asked, seen, choices, (good, bad) in zip(
        truth, _asked(instruction), _seen(response), CHOICES, VERDICTS, strict=True
    ):
        error = rng.random() < (author.false_alarm if met else author.wave_through)
        if met != error:
            judgement += [asked, good]
            score += 1
        else:
            judgement += [_another(choices, asked, rng) if error else seen, bad]
    return f"{' '.join(judgement)} Score: {score}"


def _asked(instruction: Instruction) -> tuple[str, str, str, str, str]:
    return (
        instruction.category,
        str(instruction.count),
        instruction.opening,
        instruction.style,
        instruction.closing,
    )


def _seen(response: str) -> tuple[str, str, str, str, str]:
    opening, *items, closing = response.split()
    category = next(name for name, known in CATEGORIES.items() if items[0].lower() in known)
    return category, str(len(items)), opening, "upper" if items[0].isupper() else "lower", closing


def _another(words: tuple[str, ...], word: str, rng: random.Random) -> str:
    return rng.choice([other for other in words if other != word])
