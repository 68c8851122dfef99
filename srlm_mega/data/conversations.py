"""The question of a line of a user's data, whatever its field is called, and its conversations, in all dialects.

A conversation is a list of messages (`role` and `content`, ShareGPT's `from` and `value`, or turns such as `{"human":
..., "assistant": ...}`). docs/data.md has the table.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any, Literal
from unicodedata import category

from srlm_mega.data.quarantine import optional_text, text_field
from srlm_mega.records import Message

Role = Literal["system", "user", "assistant"]
SPEAKERS: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
CONVERSATIONS = ("messages", "conversations", "conversation")
# The names of questions; of several in a line the first one is read.
QUESTIONS = ("instruction", "prompt", "question", "query", "context", "input", *CONVERSATIONS, "text")
WITH_CONTEXT = ("instruction", "question", "query")
QUESTIONS_SHOWN = "`prompt`, `instruction` (and `input`), `question`, `query`, `input`, `messages` or `text`"
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")  # Thai, Lao, Burmese, Khmer
JOINER = "\u200d"  # joins the characters on both of its sides
JOINING = f"\u200c{JOINER}" + "".join(map(chr, range(0x1F3FB, 0x1F400)))
NO_INPUT = "<noinput>"  # as Self-Instruct's and Alpaca's prompts write it


@dataclass(frozen=True)
class Question:
    """What an answer answers: the prompt, several turns flattened, and the system message, empty without one."""

    prompt: str
    system: str = ""


def question_in(fields: dict[str, Any], names: Sequence[str] = QUESTIONS) -> Question | None:
    """Return a line's question, with its `system` (`system_prompt`) and after its `history`, if there are any; None
    when no field of these names is there. An answer that ends `messages` is left out."""
    name = given_name(fields, names)
    if name is None:
        return None
    value, turns = fields[name], earlier_turns(fields)
    if isinstance(value, list | dict):
        given = messages(value, name)
        if name in CONVERSATIONS and len(given) > 1 and given[-1].role == "assistant":
            given = given[:-1]
        if given[-1].role != "user":
            raise ValueError(f"the last message of `{name}` is the {given[-1].role}'s, not the user's")
        asked = list(dropwhile(is_system, given))
        turns = given[: len(given) - len(asked)] + turns + asked
    elif name in CONVERSATIONS:
        turns += messages(value, name)
    else:
        turns.append(Message("user", task_of(fields, name)))
    return with_system(question_of(turns), fields)


def given_name(fields: dict[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of these names that a line has, of a field that is not empty if there is any: tables of several
    sets have empty texts and lists where others have a value."""
    given = [one for one in names if one in fields]
    return next((one for one in given if fields[one] not in ("", [])), given[0] if given else None)


def with_system(asked: Question, fields: dict[str, Any]) -> Question:
    """Return a question with the system message in a line's field, unless it has one of its own."""
    system = asked.system or optional_text(fields, "system") or optional_text(fields, "system_prompt")
    return Question(asked.prompt, system)


def earlier_turns(fields: dict[str, Any]) -> list[Message]:
    """Return the turns before the question in `history`, a list of pairs of a question and its answer."""
    turns: list[Message] = []
    history = fields.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        match pair:
            case [str(asked), str(answer)] if asked.strip() and answer.strip():
                turns += [Message("user", asked.strip()), Message("assistant", answer.strip())]
            case _:
                raise ValueError("`history` is not a list of pairs of a question and its answer")
    return turns


def task_of(fields: dict[str, Any], name: str) -> str:
    """Return a question's text and, after a blank line, what it is about: an instruction's `input`, or the `context` of
    an instruction, a question or a query."""
    given = optional_text(first_instance(fields), "input") if name == "instruction" else ""
    if not given and name in WITH_CONTEXT:
        given = optional_text(fields, "context")
    asked = text_field(fields, name)
    return asked if given.casefold() in ("", NO_INPUT) else f"{asked}\n\n{given}"


def first_instance(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the object with a task's input and output: the first of its `instances`, or, as in Alpaca, the task."""
    match fields.get("instances"):
        case None | []:
            return fields
        case [dict(first), *_]:
            return first
        case _:
            raise ValueError("`instances` is not a list of objects")


def messages(value: Any, name: str) -> list[Message]:
    """Parse a message or a non-empty list of them. Raise ValueError for an unknown role or an empty text."""
    value = by_rows(value)
    given = listed([value] if isinstance(value, dict) else value, name)
    turns = [turn for one in given for turn in turns_of(one, name)]
    if not turns:
        raise ValueError(f"`{name}` has no message but an empty system message")
    return turns


def by_rows(value: Any) -> Any:
    """Return a list of objects for an object of lists, as which older tables have it; anything else as it is."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value


def turns_of(value: Any, name: str) -> list[Message]:
    """Parse an element of a conversation: a message, or a question with its answer, under their speakers' names. An
    empty system message is none."""
    if not isinstance(value, dict):
        raise ValueError(f"an element of `{name}` is not a message")
    given = {key: one for key, one in value.items() if one is not None}
    speakers = [] if {"role", "from"} & given.keys() else [key for key in SPEAKERS if key in given]
    if speakers:
        return [turn for key in speakers for turn in turns_of({"role": key, "content": given[key]}, name)]
    role_name, content = ("from" if "from" in given else "role"), ("value" if "value" in given else "content")
    role = SPEAKERS.get(text_field(given, role_name).casefold())
    if role is None:
        raise ValueError(f"a message of `{name}` has the role {given[role_name]!r}, not one of {', '.join(SPEAKERS)}")
    match given.get(content):
        case [*blocks] if all(isinstance(block, dict) and block.get("type") == "text" for block in blocks):
            given[content] = "".join(text_field(block, "text", leading_blanks=True) for block in blocks)
    if role == "system" and not optional_text(given, content):
        return []
    return [Message(role, text_field(given, content, leading_blanks=role == "assistant"))]


def listed(value: Any, name: str) -> list[Any]:
    """Return the value if it is a non-empty list; raise ValueError otherwise."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{name}` is not a list, or it is empty")
    return value


def question_and_answer(turns: Sequence[Message]) -> tuple[Question, str]:
    """Split a conversation before the assistant's turn that ends it."""
    if len(turns) < 2 or turns[-1].role != "assistant" or turns[-2].role != "user":
        raise ValueError("the conversation does not end with a user's and an assistant's message")
    return question_of(turns[:-1]), turns[-1].content


def question_of(turns: Sequence[Message]) -> Question:
    """Return a conversation that ends with the user's message, apart from the system messages that begin it."""
    asked = list(dropwhile(is_system, turns))
    return Question(flattened(asked), "\n\n".join(turn.content for turn in turns[: len(turns) - len(asked)]))


def is_system(turn: Message) -> bool:
    """Tell whether a message is the system's."""
    return turn.role == "system"


def flattened(turns: Sequence[Message]) -> str:
    """Return a conversation as one text: a single user turn as it is, several turns with their speakers' names."""
    if len(turns) == 1 and turns[0].role == "user":
        return turns[0].content
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content.strip()}" for turn in turns)


def shared_beginning(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two texts where they begin to differ, at the border of a word, into the prompt that both begin with and the
    two answers; a blank before an answer stays with it, as in TRL. Raise ValueError where both share no beginning."""
    ends = min(len(chosen), len(rejected)) - 1  # each answer keeps a character
    end = next((place for place in range(ends) if chosen[place] != rejected[place]), ends)
    while end > 0 and (
        joins(chosen[end])
        or joins(rejected[end])
        or chosen[end - 1] == JOINER
        or (in_word(chosen[end - 1]) and (in_word(chosen[end]) or in_word(rejected[end])))
    ):
        end -= 1
    while end > 0 and chosen[end - 1] in " \t":
        end -= 1
    if not chosen[: max(end, 0)].strip():
        raise ValueError("`chosen` and `rejected` do not begin with the same words: give what they answer as `prompt`")
    return chosen[:end].strip(), chosen[end:], rejected[end:]


def in_word(character: str) -> bool:
    """Tell whether a character belongs to a word with spaces around it, as those of Chinese or Thai do not."""
    return (character.isalnum() or joins(character)) and character < "\u2e80" and UNSPACED.match(character) is None


def joins(character: str) -> bool:
    """Tell whether a character goes with the one before it: vowel signs, accents, the skin of an emoji."""
    return category(character)[0] == "M" or character in JOINING
