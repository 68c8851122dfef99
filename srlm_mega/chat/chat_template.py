"""Chat templates: Jinja, rendered as transformers renders it, with marks in place of the contents.

So a template's own text and the texts of a conversation are known apart, whatever the texts contain.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from srlm_mega.errors import UserError

SHIPPED_TEMPLATES = Path(__file__).with_name("templates")
# Without transformers' clock a template writes its own fixed date, and a prompt has the same tokens on every day.
NO_CLOCK = "{%- set strftime_now = no_clock -%}"
BLANKS = "\t \n"
IN_BRACKETS, BARE_WORDS = re.compile(r"[\[<]\S*\w\S*[\]>]"), re.compile(r"[\w\s]*")
REMEDY = "give another one by model.chat_template (llama2, chatml, llama3 or a .jinja file)"


class GenerationTag(Extension):
    """The tag by which templates mark an answer for transformers; its content is all that is rendered."""

    tags = {"generation"}  # noqa: RUF012  # as its base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> NoReturn:
    """End the rendering: the function by which a template refuses a conversation."""
    raise TemplateError(message)


# As transformers' apply_chat_template has it. It is a sandbox: a template from the hub is not trusted.
JINJA = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
JINJA.globals["raise_exception"] = raise_exception
JINJA.filters["tojson"] = partial(json.dumps, ensure_ascii=False)


class Slot(NamedTuple):
    """A place for a text, and whether the template removes blanks before and after it."""

    lstrip: bool
    rstrip: bool

    def fill(self, text: str) -> str:
        """Return the text as the template writes it."""
        text = text.lstrip() if self.lstrip else text
        return text.rstrip() if self.rstrip else text


Part = str | Slot


@dataclass(frozen=True)
class TurnLayout:
    """What a template writes around the texts of a conversation. The parts of a prompt are literal texts and slots."""

    prompt: tuple[Part, ...]
    system_prompt: tuple[Part, ...] | None  # None: the template has no system turn
    before_answer: str  # blanks between the prompt and the answer
    answer: Slot
    after_answer: str
    next_prompt: tuple[Part, ...]  # begins with after_answer

    @property
    def prompt_end(self) -> str:
        """Literal text between the user's text and the answer."""
        end = self.prompt[-1]
        assert isinstance(end, str), "a prompt ends in literal text"
        return end


def shipped_template(name: str) -> str:
    """Return the shipped template of this name: llama2, chatml or llama3."""
    return (SHIPPED_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def without_clock(template: str) -> str:
    """Return a template that writes no date of today."""
    return NO_CLOCK + template if "strftime_now" in template and not template.startswith(NO_CLOCK) else template


def turn_layout(template: str, special_tokens: Mapping[str, str], origin: str) -> TurnLayout:
    """Render a template and return what it writes around the texts.

    `special_tokens` are the tokenizer's, by transformers' names (`bos_token`, ...). UserError, with `origin`, for a
    template that raises, that drops or changes a text, or that does not write where the assistant's turn begins.
    """

    def render(messages: Sequence[tuple[str, str]]) -> str:
        values = {"messages": [{"role": role, "content": text} for role, text in messages], **special_tokens}
        try:
            return JINJA.from_string(template).render(values, add_generation_prompt=True, tools=None, documents=None)
        except Exception as error:  # a template is a program, which may end in any
            raise UserError(f"the chat template of {origin} cannot be rendered ({error}): {REMEDY}") from None

    def split(*roles: str) -> tuple[list[str], list[Slot]]:
        """Return the literal texts around the texts of a conversation's turns, and the places of those."""
        marks = [f"\ue000Text{number}\ue001" for number in range(len(roles))]
        text = render(list(zip(roles, marks, strict=True)))
        padded = render([(role, f"{BLANKS}{mark}{BLANKS}") for role, mark in zip(roles, marks, strict=True)])
        literals, slots = [], []
        for role, mark in zip(roles, marks, strict=True):
            before, found, text = text.partition(mark)
            if not found or mark in text:
                raise UserError(f"the chat template of {origin} drops, repeats or moves the {role}'s text: {REMEDY}")
            literals.append(before)
            slots.append(Slot(f"{BLANKS}{mark}" not in padded, f"{mark}{BLANKS}" not in padded))
        return [*literals, text], slots

    (begin, end), (user,) = split("user")
    (_, between, after_answer, next_end), (_, answer, next_user) = split("user", "assistant", "user")
    if not end.startswith(between.rstrip()):
        raise UserError(
            f"the chat template of {origin} writes no generation prompt: with add_generation_prompt a prompt ends in "
            f"{end[-40:]!r}, and an answer follows on {between[-40:]!r}: {REMEDY}"
        )
    try:
        (first, second, third), (system, asked) = split("system", "user")
        system_prompt: tuple[Part, ...] | None = (first, system, second, asked, third)
    except UserError:  # some templates refuse a system turn, or leave it out
        system_prompt = None
    return TurnLayout(
        prompt=(begin, user, end),
        system_prompt=system_prompt,
        before_answer=between[len(end) :],
        answer=answer,
        after_answer=after_answer,
        next_prompt=(after_answer, next_user, next_end),
    )


def text_markers(line: str) -> list[str]:
    """Return the turn markers in a line of a template's ordinary text: words in brackets such as [INST], else the whole
    line such as `### Response:`. Bare words are none: they stand next to special tokens."""
    return IN_BRACKETS.findall(line) or ([] if BARE_WORDS.fullmatch(line) else [line.strip()])
