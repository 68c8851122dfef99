"""Judge templates: a text with two place-holders, filled literally and once. What is filled in is data."""

import re
from dataclasses import dataclass
from pathlib import Path

from srlm_mega.errors import UserError

INSTRUCTION, RESPONSE = "{{instruction}}", "{{response}}"
PLACE_HOLDER = re.compile(f"({re.escape(INSTRUCTION)}|{re.escape(RESPONSE)})")


@dataclass(frozen=True)
class JudgeTemplate:
    """`parts` is the text cut at its two place-holders, which are kept as elements of their own."""

    parts: tuple[str, ...]

    @classmethod
    def from_text(cls, text: str, origin: str) -> "JudgeTemplate":
        """Check a template's text. UserError when a place-holder is not there exactly once; `origin` names it."""
        for place_holder in (INSTRUCTION, RESPONSE):
            count = text.count(place_holder)
            if count != 1:
                raise UserError(
                    f"the judge template {origin} has {place_holder} {count} times: write it exactly once, "
                    f"where the {place_holder.strip('{}')} is to stand"
                )
        return cls(tuple(PLACE_HOLDER.split(text)))

    def fill(self, instruction: str, response: str) -> str:
        """The judge's user turn. Only the template's own place-holders are replaced, whatever the two texts contain."""
        values = {INSTRUCTION: instruction, RESPONSE: response}
        return "".join(values.get(part, part) for part in self.parts)


def load_template(template: Path | str) -> JudgeTemplate:
    """`additive` and `toy` are shipped; a path is the user's own. A final line break is not part of a template."""
    path = Path(__file__).with_name(f"{template}.txt") if template in ("additive", "toy") else Path(template)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"judge.template: there is no file {path}. Give a text file, or one of additive, toy") from None
    except UnicodeDecodeError as error:
        raise UserError(f"judge.template: {path} is not UTF-8 (byte {error.start}). Save it as UTF-8") from None
    return JudgeTemplate.from_text(text.rstrip("\n"), str(path))
