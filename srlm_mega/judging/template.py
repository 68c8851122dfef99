"""Judge templates: texts with placeholders, filled literally and once. What is filled in is data."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from srlm_mega.errors import UserError
from srlm_mega.judging.scores import MAX_SCORE, parse_score

IN_BRACES = re.compile(r"\{+[ \t]*\w{1,40}[ \t]*\}+")


@dataclass(frozen=True)
class Template:
    """A template; `parts` is its text split at its placeholders (`{{name}}`), which are kept as elements."""

    parts: tuple[str, ...]

    @classmethod
    def from_text(cls, text: str, origin: str, names: Sequence[str]) -> "Template":
        """Parse a template's text; a placeholder may have blanks within. Raise UserError, with `origin`, unless each
        occurs exactly once."""
        text = re.sub(rf"\{{\{{[ \t]*({'|'.join(names)})[ \t]*\}}\}}", r"{{\1}}", text)
        for name in names:
            count = text.count(placeholder(name))
            if count != 1:
                others = ", ".join(dict.fromkeys(IN_BRACES.findall(text)))
                raise UserError(
                    f"the judge template {origin} has {placeholder(name)} {count} times: write it exactly once, "
                    f"where the {name} belongs" + (f". It has {others}" if others and not count else "")
                )
        return cls(tuple(re.split(f"({'|'.join(re.escape(placeholder(name)) for name in names)})", text)))

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the judge's user turn. Placeholders within the values are not replaced."""
        by_placeholder = {placeholder(name): value for name, value in values.items()}
        return "".join(by_placeholder.get(part, part) for part in self.parts)


def placeholder(name: str) -> str:
    """Return the placeholder of a value in a template."""
    return "{{" + name + "}}"


SHIPPED = ("additive", "multiple_choice", "score_only", "toy")
INSTRUCTION, RESPONSE = placeholder("instruction"), placeholder("response")
# `Score:` in a template's own spelling, with what stands for the number: <points>, {n}, [0-5], N.
SCORE_LINE = re.compile(
    r"(?P<before>(?<![a-z0-9])[*_]*(?:(?:total|final|overall) )?(?<![a-z0-9])score[ \t*_]*:[ \t*_]*)"
    r"(?P<points><[^<>\n]*>|\{[^{}\n]*\}|\[[^\[\]\n]*\]|[a-z]\b)"
    r"(?P<after>(?:[ \t]*(?:/|out of)[ \t]*\d+\b)?[*_]*)",
    re.IGNORECASE,
)
UP_TO = r" ?(?:-|–|to|and) ?(\d++)(?! *(?:word|sentence|line|paragraph|%))"  # the end of a range of points
# The range of points, in their place or behind the line: <0-10>, "with N from 1 to 10".
RANGE = re.compile(rf"[^\d;]{{0,40}}?\d+{UP_TO}", re.IGNORECASE)
# A scale anywhere: "rate it on a scale of 1 to 10". Criteria may have scales of their own, so it is no proof.
SCALE = re.compile(rf"\b(?:scale|rate|grade|score)\b[^.;\n]{{0,60}}?\b[01]{UP_TO}", re.IGNORECASE)
EXAMPLE = ("Name the planets that have rings.", "Jupiter, Saturn, Uranus and Neptune.")


class JudgeTemplate:
    """The template of the additive judge: an instruction and one response."""

    def __init__(self, template: Template) -> None:
        self._template = template

    @property
    def text(self) -> str:
        """Text of the template, unfilled."""
        return "".join(self._template.parts)

    @classmethod
    def from_text(cls, text: str, origin: str) -> "JudgeTemplate":
        """Parse a template's text; see `Template.from_text`."""
        return cls(Template.from_text(text, origin, ("instruction", "response")))

    @classmethod
    def from_bytes(cls, content: bytes, origin: str) -> "JudgeTemplate":
        """Parse a template's text in UTF-8, without a final line break; see `Template.from_text`. UserError for another
        encoding."""
        try:
            text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"judge.template: {origin} is not UTF-8 (byte {error.start}). Save it as UTF-8") from None
        return cls.from_text(text, origin)

    def fill(self, instruction: str, response: str) -> str:
        """Return the judge's user turn; see `Template.fill`."""
        return self._template.fill({"instruction": instruction, "response": response})

    def instruction_in(self, prompt: str) -> str | None:
        """Return the instruction of a judge's user turn that `fill` could have made, None for any other text."""
        literal = [re.escape(part) for part in self._template.parts]
        pattern = "".join(literal).replace(re.escape(INSTRUCTION), "(.*?)").replace(re.escape(RESPONSE), ".*")
        found = re.fullmatch(pattern, prompt, re.DOTALL)
        return None if found is None else found[1]

    @property
    def score_line(self) -> re.Match[str] | None:
        """The last line of the template that says how to write a score, None where it does not say."""
        *_, form = (None, *SCORE_LINE.finditer(self.text))
        return form

    def check(self, origin: str, most: float) -> None:
        """Raise UserError, with `origin`, when the template asks for another scale than 0 to `most`, whose scores would
        not be read."""
        form = self.score_line
        if form is None:
            return
        behind = self.text[form.end() :].partition("\n")[0]
        ranges = [RANGE.fullmatch(form["points"][1:-1]), RANGE.match(behind.partition(".")[0])]
        asked = next((found[1] for found in ranges if found is not None), None)
        if parse_score(self.judgement(most), most) is None or asked not in (None, f"{most:g}"):
            raise UserError(
                f"judge.template: {origin} asks for {form[0] + behind!r}, and scores are 0 to {most:g}: correct the "
                "template, or set judge.max_score to its largest score"
            )

    def doubt(self, most: float) -> str | None:
        """Return what may be wrong with the scores that the template asks for, None for nothing."""
        if self.score_line is None:
            return f"does not say how to write a score: only `Score: N` is read, N from 0 to {most:g}"
        scales = {found[1]: found[0] for found in SCALE.finditer(self.text)}
        if not scales or f"{most:g}" in scales:
            return None
        return f"says {next(iter(scales.values()))!r}, and scores are read from 0 to {most:g} (judge.max_score)"

    def example(self, most: float) -> str:
        """Return the template filled with an example, and a judgement in its form with what is read from it."""
        judgement = self.judgement(most, "All four, and nothing else.")
        read = f"{parse_score(judgement, most):g}, of 0 to {most:g}"
        return f"{self.fill(*EXAMPLE)}\n\n--- a judgement, read as {read}:\n{judgement}"

    def judgement(self, score: float, rationale: str = "") -> str:
        """Return a judgement: the rationale, then a line with the score as the template spells it, or `Score: 4` where
        it does not say."""
        form = self.score_line
        line = f"Score: {score:g}" if form is None else f"{form['before']}{score:g}{form['after']}"
        return f"{rationale}\n{line}" if rationale else line


def load_template(template: Path | str, most: float = MAX_SCORE) -> JudgeTemplate:
    """Read a shipped template (a name of `SHIPPED`) or the user's own (a path), without a final line break. Raise
    UserError when there is no such file, or it is no template, or one of another scale than 0 to `most`."""
    path = Path(__file__).with_name(f"{template}.txt") if template in SHIPPED else Path(template)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"judge.template: there is no file {path}. Give a text file, or one of {', '.join(SHIPPED)}"
        ) from None
    found = JudgeTemplate.from_bytes(content, str(path))
    found.check(str(path), most)
    return found
