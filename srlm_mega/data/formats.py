"""Readers of JSONL with supervised examples and preferences in the field's dialects, and seed data from such files.

Supervised: `messages`; `prompt` and `completion`; `instruction`, `input` and `output` (Alpaca, Self-Instruct's seed
tasks). Preferences: `prompt`, `chosen`, `rejected` (TRL; the prompt may be
the beginning that both share); `messages` and `rejected_response` (ms-swift); `context` and `completions` with ranks
(NeMo-RL); `prompt`, `chosen_response`, `rejected_response` (NeMo-Aligner). Prompts and answers are text or lists of
messages. A system message is the first of the messages, or a field `system`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import Any, Literal

from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.quarantine import UserLines, optional_text, text_field
from srlm_mega.data.seed_sets import SeedItem, SeedSets, draw_sets
from srlm_mega.data.self_instruct import first_instance, task_of
from srlm_mega.records import Message, RankedReplies, RankedReply, one_text

SOURCE = "jsonl"
SPEAKERS: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
SFT_DIALECTS = "`messages`; `prompt` and `completion`; or `instruction` and `output`"
PREFERENCE_DIALECTS = (
    "`prompt`, `chosen` and `rejected`; `messages` and `rejected_response`; `context` and `completions`; or `prompt`, "
    "`chosen_response` and `rejected_response`"
)


@dataclass(frozen=True)
class Question:
    """What an answer answers: the prompt, several turns flattened, and the system message, empty without one."""

    prompt: str
    system: str = ""


def read_jsonl_sets(section: SeedDataConfig, seed: int, quarantine: Path) -> SeedSets:
    """Draw the sets from supervised examples at `section.path` and preferences at `section.ranked_path`, one line in
    memory at a time.

    Raise UserError when the sets cannot be filled, or for too many broken lines (see `UserLines`).
    """
    assert section.path and section.ranked_path, "Config refuses seed_data.source=jsonl without both paths"
    strip = section.strip_template
    # Ids say which of the two files they are from: both may have the same name.
    parse_one = partial(parse_example, Path(f"example-{section.path.name}"))
    examples = UserLines(section.path, parse_one, quarantine, strip)
    parse_ranked = partial(parse_ranking, Path(f"ranked-{section.ranked_path.name}"))
    rankings = UserLines(section.ranked_path, parse_ranked, quarantine.with_name(f"ranked_{quarantine.name}"), strip)

    def items() -> Iterator[SeedItem]:
        yield from examples
        yield from rankings

    def counts() -> dict[str, int]:
        read = {"examples": examples.good, "bad_lines": examples.bad, "templated_lines": examples.templated}
        ranked = {"rankings": rankings.good, "bad_rankings": rankings.bad, "templated_rankings": rankings.templated}
        return read | ranked

    return draw_sets(items(), section, SOURCE, seed, quarantine.parent, counts)


def parse_example(path: Path, number: int, fields: dict[str, Any]) -> SeedItem:
    """Parse a line of a file of supervised examples. Raise ValueError when it is not one."""
    if "messages" in fields:
        asked, target = question_and_answer(messages(fields["messages"], "messages"))
    elif "prompt" in fields and "completion" in fields:
        asked = question(fields, "prompt")
        target = answer_to(asked, fields, "completion")
    elif "instruction" in fields and ("output" in fields or "instances" in fields):
        asked, target = Question(task_of(fields)), text_field(first_instance(fields), "output")
    else:
        raise ValueError(f"not a supervised example: it needs {SFT_DIALECTS}; it has {keys(fields)}")
    system = asked.system or optional_text(fields, "system")
    return SeedItem(line_name(path, number), asked.prompt, target, system=system)


def parse_ranking(path: Path, number: int, fields: dict[str, Any]) -> SeedItem:
    """Parse a line of a file of preferences. Raise ValueError when it is not one, or prefers no answer."""
    asked, replies = ranking(fields)
    if len({text for text, _ in replies}) < len(replies):
        raise ValueError("two of the ranked answers are the same")
    if len({rank for _, rank in replies}) < 2:
        raise ValueError("no answer is ranked above another")
    ranked = tuple(RankedReply(text, rank) for text, rank in sorted(replies, key=lambda reply: reply[1]))
    name = line_name(path, number)
    system = asked.system or optional_text(fields, "system")
    replies_to = RankedReplies(f"{SOURCE}-{name}", one_text(asked.prompt, system), ranked)
    return SeedItem(name, asked.prompt, None, replies_to, system=system)


def ranking(fields: dict[str, Any]) -> tuple[Question, list[tuple[str, int]]]:
    """Return the question of a preference, and its answers with their ranks (0 is the best)."""
    if "chosen_response" in fields:
        asked = question(fields, "prompt")
        better, worse = text_field(fields, "chosen_response"), text_field(fields, "rejected_response")
    elif "rejected_response" in fields:
        asked, better = question_and_answer(messages(fields.get("messages"), "messages"))
        worse = text_field(fields, "rejected_response")
    elif "completions" in fields:
        return question(fields, "context"), [ranked_completion(one) for one in listed(fields["completions"])]
    elif "chosen" in fields and "rejected" in fields:
        if "prompt" in fields:
            asked = question(fields, "prompt")
        else:
            asked, _ = question_and_answer(messages(fields["chosen"], "chosen"))
        better, worse = answer_to(asked, fields, "chosen"), answer_to(asked, fields, "rejected")
    else:
        raise ValueError(f"not a preference: it needs {PREFERENCE_DIALECTS}; it has {keys(fields)}")
    return asked, [(better, 0), (worse, 1)]


def ranked_completion(value: Any) -> tuple[str, int]:
    """Parse an element of NeMo-RL's `completions` to its text and rank (0 is the best)."""
    if not isinstance(value, dict):
        raise ValueError("an element of `completions` is not an object with `rank` and `completion`")
    rank = value.get("rank")
    if type(rank) is not int or rank < 0:
        raise ValueError(f"a completion has the rank {rank!r}, not an integer from 0")
    return answer_to(None, value, "completion"), rank


def question(fields: dict[str, Any], name: str) -> Question:
    """Return the prompt in a field that holds text, or messages of which the last is the user's."""
    if isinstance(fields.get(name), list):
        turns = messages(fields[name], name)
        if turns[-1].role != "user":
            raise ValueError(f"the last message of `{name}` is the {turns[-1].role}'s, not the user's")
        return question_of(turns)
    return Question(text_field(fields, name))


def answer_to(to: Question | None, fields: dict[str, Any], name: str) -> str:
    """Return the answer in a field that holds text, or messages that end with the assistant's, after the prompt's."""
    if not isinstance(fields.get(name), list):
        return text_field(fields, name)
    turns = messages(fields[name], name)
    if len(turns) == 1 and turns[0].role == "assistant":
        return turns[0].content
    asked, answer = question_and_answer(turns)
    if asked != to:
        raise ValueError(f"the messages before the answer in `{name}` are not those of the prompt")
    return answer


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
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)


def messages(value: Any, name: str) -> list[Message]:
    """Parse a non-empty list of messages. Raise ValueError for an unknown role or an empty text."""
    turns = []
    for turn in listed(value, name):
        if not isinstance(turn, dict):
            raise ValueError(f"an element of `{name}` is not a message")
        role = SPEAKERS.get(text_field(turn, "role"))
        if role is None:
            raise ValueError(f"a message of `{name}` has the role {turn['role']!r}, not one of {', '.join(SPEAKERS)}")
        turns.append(Message(role, text_field(turn, "content")))
    return turns


def listed(value: Any, name: str = "completions") -> list[Any]:
    """Return the value if it is a non-empty list; raise ValueError otherwise."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{name}` is not a list, or it is empty")
    return value


def keys(fields: dict[str, Any]) -> str:
    """Return the names of a line's fields, for a message."""
    return ", ".join(f"`{name}`" for name in fields) or "no fields"


def line_name(path: Path, number: int) -> str:
    """Return the id of a line's record."""
    return f"{path.name.partition('.')[0]}-{number:07d}"
