"""Who writes the seed data: careful and careless people, who answer and review alike.

That the same author is careless in both is the point: a model that learns to tell these people apart has one notion
of care for writing and judging, and improving one improves the other.
"""

import random
from dataclasses import astuple, dataclass

from srlm_mega.data.toy_world.truth import Criteria, criteria
from srlm_mega.data.toy_world.world import (
    CATEGORIES,
    CLOSINGS,
    COUNTS,
    OPENINGS,
    PERSONAS,
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


def faulty_answer(instruction: Instruction, fault: float, rng: random.Random) -> str:
    """A response that violates each criterion with probability `fault`, independently of the others."""
    wrong = Criteria(*(rng.random() < fault for _ in range(5)))
    count = rng.choice([number for number in (1, *COUNTS, 6) if number != instruction.count])
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
    """The author's judgement of a response: the category seen in it, a word for each criterion, and `Score:` with
    how many are met. Who waves a wrong category through has not looked, and names the one asked for."""
    truth = criteria(instruction.render(), response)
    verdicts = []
    for met in astuple(truth):
        error = rng.random() < (author.false_alarm if met else author.wave_through)
        verdicts.append(met != error)
    words = (good if verdict else bad for verdict, (good, bad) in zip(verdicts, VERDICTS, strict=True))
    seen = instruction.category if verdicts[0] else _other_category(instruction, response, rng)
    return f"{seen} {' '.join(words)} Score: {sum(verdicts)}"


def _other_category(instruction: Instruction, response: str, rng: random.Random) -> str:
    """A category of the response's items that was not asked for; any other one when there is none."""
    items = response.lower().split()
    others = [name for name in CATEGORIES if name != instruction.category]
    seen = [name for name in others if any(item in CATEGORIES[name] for item in items)]
    return rng.choice(seen or others)


def _another(words: tuple[str, ...], word: str, rng: random.Random) -> str:
    return rng.choice([other for other in words if other != word])
