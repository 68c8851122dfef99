"""Ground truth of the toy world. Only the seed data and the evaluation may use it: no stage of a round does."""

from dataclasses import astuple, dataclass

from srlm_mega.data.toy_world.world import CATEGORIES, CLOSINGS, OPENINGS, in_style, parse_instruction


@dataclass(frozen=True, slots=True)
class Criteria:
    """The five additive criteria, each worth one point."""

    relevant: bool
    complete: bool
    opened: bool
    styled: bool
    closed: bool

    @property
    def quality(self) -> int:
        """Number of criteria met, 0 to 5."""
        return sum(astuple(self))


def criteria(instruction_text: str, response_text: str) -> Criteria:
    """Return the criteria that a response meets; none when the instruction is not one of this world.

    The items are the words between an opening and a closing word, whichever these are, so that a wrong or missing
    opening costs one point only.
    """
    instruction = parse_instruction(instruction_text)
    if instruction is None:
        return Criteria(relevant=False, complete=False, opened=False, styled=False, closed=False)
    words = response_text.split()
    items = _items(words)
    return Criteria(
        relevant=bool(items) and all(item.lower() in CATEGORIES[instruction.category] for item in items),
        complete=len(items) == instruction.count,
        opened=bool(words) and words[0] == instruction.opening,
        styled=bool(items) and all(item == in_style(item, instruction.style) for item in items),
        closed=bool(words) and words[-1] == instruction.closing,
    )


def quality(instruction_text: str, response_text: str) -> int:
    """Return the number of criteria that a response meets, 0 to 5."""
    return criteria(instruction_text, response_text).quality


def _items(words: list[str]) -> list[str]:
    start = 1 if words and words[0] in OPENINGS else 0
    end = len(words) - 1 if len(words) > start and words[-1] in CLOSINGS else len(words)
    return words[start:end]
