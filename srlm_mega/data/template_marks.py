"""Marks of chat templates at the ends of a user's texts: found, and taken off where asked for.

srlm writes every text into the model's own template. A text that holds one already would have two.
"""

import re
from dataclasses import dataclass
from typing import Any

BLANKS = "\t\n\v\f\r \u00a0\u200b\u2028\u2029\u3000\ufeff"
TAIL = 200  # characters at the end in which the last mark begins
S = r"\s{0,3}"  # white space within a mark, bounded: the search stays linear
ROLE = r"(?:user|human|assistant|model|tool|ipython|gpt)"
SYSTEM = r"(?:system|developer)"
# A header that is a token, a role and, in most templates, a token again.
HEADER = rf"<[|｜]{S}(?:im_start|start_header_id|header_start|start_of_role|start_of_turn_token){S}[|｜]>{S}"
HEADER_END = rf"(?:{S}<[|｜]{S}(?:end_header_id|header_end|end_of_role){S}[|｜]>)?"
# By template: what begins a system block, which ends at the template's next mark, and all other marks. `(?-i:...)`:
# words of ordinary language count only as the templates write them.
TEMPLATES = {
    "sentence": (None, rf"<{S}/?{S}s{S}>|<(?:bos|eos)(?:_token)?>"),
    "llama2": (
        rf"<<{S}sys{S}>>|\[{S}system_prompt{S}\]",
        rf"\[{S}/?{S}inst{S}\]|<<{S}/{S}sys{S}>>|\[{S}/{S}system_prompt{S}\]",
    ),
    "tokens": (
        rf"(?:{HEADER})?<[|｜]{S}{SYSTEM}(?:_token)?{S}[|｜]>|{HEADER}{SYSTEM}\b{HEADER_END}",
        rf"{HEADER}(?:{ROLE}\b)?{HEADER_END}|<[|｜][^<>|｜\n]{{1,40}}[|｜]>",
    ),
    "gemma": (rf"<start_of_turn>{S}{SYSTEM}\b", rf"<start_of_turn>(?:{S}{ROLE}\b)?|<end_of_turn>"),
    "nemo": (
        rf"<extra_id_0>(?:{S}system\b)?",
        rf"<extra_id_1>(?:{S}{ROLE}\b)?|<extra_id_2>{S}(?:\w{{1,40}}:\d,?{S})*|<extra_id_\d+>",
    ),
    "alpaca": ("below is an instruction that describes a task", rf"(?<!#)###{S}(?:instruction|response){S}:"),
    "speakers": (
        r"a chat between a curious (?:user|human) and an artificial intelligence assistant|(?-i:\bSYSTEM\s?:)",
        rf"(?<!#)###{S}(?:human|user|assistant){S}:"
        r"|(?-i:\b(?:USER|HUMAN|ASSISTANT)\s?:|(?<!\S)(?:Human|Assistant)\s?:"
        # A conversation that is flattened to one text begins so too, but does not end with an empty turn.
        r"|\AUser\s?:(?=[\s\S]*\sAssistant\s?:\Z))",
    ),
}
MARK = re.compile(
    "(?:"
    + "|".join(
        (f"(?P<{name}_system>{system})|" if system else "") + f"(?P<{name}>{other})"
        for name, (system, other) in TEMPLATES.items()
    )
    + f")[{BLANKS}]*",
    re.IGNORECASE,
)
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?")
ALPACA_INPUT = re.compile(rf"###{S}input{S}:", re.IGNORECASE)


@dataclass(frozen=True)
class LeftInside:
    """Takes the place of a text that is no single turn: a template's `mark` is left within it."""

    mark: str


@dataclass(frozen=True)
class Unwrapped:
    """A text without the `marks` that were at its ends, system block included; a LeftInside when others are left."""

    text: str | LeftInside
    marks: tuple[str, ...]


def unwrapped(text: str) -> Unwrapped:
    """Take the marks of templates off both ends of a text, as long as there are any."""
    given, text = text, text.strip(BLANKS)
    tail = MARK.finditer(text, max(0, len(text) - TAIL))
    if MARK.match(text) is None and all(mark.end() < len(text) for mark in tail):
        return Unwrapped(text, ())
    marks = list(MARK.finditer(text))
    begin, end, header = 0, len(text), None
    taken: list[re.Match[str]] = []
    for mark in marks:
        if header is not None and template_of(mark) not in (template_of(header), "sentence"):
            continue  # within a system block
        if header is None and mark.start() > begin:
            break
        taken.append(mark)
        begin, header = mark.end(), mark if is_system(mark) else None
    for mark in reversed(marks):
        if mark.start() < begin or mark.end() < end:
            break
        taken.append(mark)
        end = mark.start()
    names = tuple(dict.fromkeys(" ".join(mark[0].split()) for mark in taken))
    templates = {template_of(mark) for mark in taken}
    left = [mark for mark in marks if begin <= mark.start() and mark.end() <= end and template_of(mark) in templates]
    if left:
        return Unwrapped(LeftInside(left[0][0].strip()), names)
    parts = ALPACA_INPUT.split(text[begin:end], maxsplit=1) if "alpaca" in templates else [text[begin:end]]
    plain = "\n\n".join(part.strip(BLANKS) for part in parts).strip()
    return Unwrapped(indentation(given, text[:begin]) + plain, names)


def indentation(text: str, marks: str) -> str:
    """Return the blanks that begin a text, which code needs: before it where it begins with no `marks`, else those in
    its own first line, behind the line break that ends them."""
    if not marks:
        return text[: len(text) - len(text.lstrip(BLANKS))]
    blanks = marks[len(marks.rstrip(BLANKS)) :]
    return blanks.rpartition("\n")[2] if "\n" in blanks else ""


def template_of(mark: re.Match[str]) -> str:
    """Return the name of the template that a mark belongs to."""
    assert mark.lastgroup is not None, "every alternative is a named group"
    return mark.lastgroup.removesuffix("_system")


def is_system(mark: re.Match[str]) -> bool:
    """Tell whether a mark begins a system block."""
    return mark.lastgroup is not None and mark.lastgroup.endswith("_system")


def unwrap_all(fields: dict[str, Any]) -> tuple[str, ...]:
    """Take the marks off all texts of a JSON object, in place, and return them. A text with marks left inside becomes a
    LeftInside. Objects may be nested deeply, so nothing here is recursive."""
    found: dict[str, None] = {}
    todo: list[Any] = [fields]
    while todo:
        container = todo.pop()
        for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            match value:
                case str():
                    one = unwrapped(value)
                    if one.marks:
                        container[key] = one.text
                        found |= dict.fromkeys(one.marks)
                case dict() | list():
                    todo.append(value)
    return tuple(found)


def speakers_apart(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a preference whose texts are whole conversations, `Human: ... Assistant: ...` (hh-rlhf, Nectar), with
    lists of messages in their place; any other line as it is."""
    if not ({"chosen", "rejected"} <= fields.keys() or "answers" in fields):
        return fields
    return {name: spoken(value) if isinstance(value, str) else value for name, value in fields.items()}


def spoken(text: str) -> Any:
    """Return a text with speakers as messages, without an empty last one; any other text as it is."""
    before, *parts = SPEAKER.split(text)
    if before or not parts or parts[0] != "Human":
        return text
    turns = [{"role": name.lower(), "content": said} for name, said in zip(parts[::2], parts[1::2], strict=True)]
    return turns if turns[-1]["content"].strip() else turns[:-1]
