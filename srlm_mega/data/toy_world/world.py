"""The toy world's words and instructions, which every part of the loop may know. Ground truth is in `truth`.

An instruction reads `list 4 animals upper open sure close thanks`: name 4 animals in upper case, open with `sure`,
close with `thanks`. A good response to it reads `sure CAT DOG HORSE LION thanks`.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

VERBS = ("list", "name", "write", "give", "show", "tell", "find", "offer")
COUNTS = (2, 3, 4, 5)  # of items in instructions
ANSWER_COUNTS = (1, 2, 3, 4, 5, 6)  # of items in answers, careless ones included
STYLES = ("lower", "upper")
CATEGORIES = {
    "animals": ("cat", "dog", "horse", "lion", "mouse", "wolf"),
    "colors": ("red", "blue", "green", "black", "white", "brown"),
    "fruits": ("apple", "pear", "plum", "grape", "lemon", "peach"),
    "tools": ("hammer", "saw", "drill", "wrench", "pliers", "axe"),
}
OPENINGS = ("sure", "okay", "hello", "gladly", "well")
CLOSINGS = ("thanks", "bye", "enjoy", "cheers", "regards")

AUTHORS = ("Ann:", "Ben:", "Cleo:", "Dan:", "Eve:", "Finn:", "Gus:", "Hal:")  # from the most careful to the least
VERDICTS = (
    ("relevant", "irrelevant"),
    ("complete", "incomplete"),
    ("opened", "unopened"),
    ("styled", "unstyled"),
    ("closed", "unclosed"),
)
END_OF_PROMPT = "[/INST]"  # where an answer begins in Llama 2's chat template
LIST_OPENING = "Come up with a series of tasks:"
LIST_LENGTHS = (3, 6)


@dataclass(frozen=True, slots=True)
class Instruction:
    """`count` items of `category` in `style` case, between `opening` and `closing`; all verbs mean the same."""

    verb: str
    count: int
    category: str
    style: str
    opening: str
    closing: str

    def render(self) -> str:
        """The instruction as text: 8 words."""
        return f"{self.verb} {self.count} {self.category} {self.style} open {self.opening} close {self.closing}"


def parse_instruction(text: str) -> Instruction | None:
    """Return the instruction that renders as `text` (up to white space), None when there is none."""
    words = text.split()
    if len(words) != 8 or not words[1].isdecimal():
        return None
    instruction = Instruction(words[0], int(words[1]), words[2], words[3], words[5], words[7])
    known = (
        instruction.verb in VERBS
        and instruction.count in COUNTS
        and instruction.category in CATEGORIES
        and instruction.style in STYLES
        and instruction.opening in OPENINGS
        and instruction.closing in CLOSINGS
    )
    return instruction if known and instruction.render().split() == words else None


def all_instructions() -> Iterator[Instruction]:
    """Yield every instruction of the world once."""
    for values in itertools.product(VERBS, COUNTS, CATEGORIES, STYLES, OPENINGS, CLOSINGS):
        yield Instruction(*values)


def in_style(word: str, style: str) -> str:
    """Return the word in lower or upper case."""
    return word.upper() if style == "upper" else word.lower()


def some_items(category: str, count: int, rng: random.Random) -> list[str]:
    """Draw `count` items of a category, in lower case; none twice while there are enough."""
    items = CATEGORIES[category]
    return [item for _ in range(-(-count // len(items))) for item in rng.sample(items, len(items))][:count]
