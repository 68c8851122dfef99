"""Readers of supervised examples and preferences in the field's dialects, and seed data from such files.

docs/data.md has the table of dialects: what TRL, ms-swift, LlamaFactory, axolotl, NeMo-RL and others write. Prompts and
answers are text or conversations (`srlm_mega.data.conversations`).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.conversations import (
    CONVERSATIONS,
    QUESTIONS,
    QUESTIONS_SHOWN,
    Question,
    by_rows,
    first_instance,
    given_name,
    listed,
    messages,
    question_and_answer,
    question_in,
    shared_beginning,
    with_system,
)
from srlm_mega.data.quarantine import LeftOut, UserLines, text_field, without_null
from srlm_mega.data.seed_sets import SeedItem, SeedSets, draw_sets
from srlm_mega.records import Message, RankedReplies, RankedReply, one_text

SOURCE = "jsonl"
ANSWERS = ("completion", "output", "response")
CHOSEN = ("chosen", "chosen_response")
REJECTED = ("rejected", "rejected_response", "rejected_messages")
RANKED = ("completions", "answers")
ORDERS = ("rank", "score", "overall_score", "fine-grained_score")  # the last two are UltraFeedback's
SFT_DIALECTS = f"`messages`; or a question ({QUESTIONS_SHOWN}) with `completion`, `output` or `response`"
PREFERENCE_DIALECTS = (
    "`chosen` and `rejected`, `chosen_response` and `rejected_response`, `completions` with ranks or scores, or "
    "`messages` and `rejected_response`"
)


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
        left_out = {"rankings_without_preference": rankings.left_out, "examples_labelled_bad": examples.left_out}
        return read | ranked | left_out

    return draw_sets(items(), section, SOURCE, seed, quarantine.parent, counts)


def parse_example(path: Path, number: int, fields: dict[str, Any]) -> SeedItem:
    """Parse a line of a file of supervised examples. Raise ValueError when it is not one."""
    asked, target = answered(fields)
    return SeedItem(line_name(path, number), asked.prompt, target, system=asked.system)


def answered(fields: dict[str, Any]) -> tuple[Question, str]:
    """Return the question and the answer of a supervised example. Raise ValueError when it is not one, LeftOut when its
    `label` says that the answer is a bad one."""
    if fields.get("label") is False:
        raise LeftOut("its `label` says that the answer is a bad one")
    conversation = given_name(fields, CONVERSATIONS)
    if conversation is not None and (fields[conversation] != [] or given_name(fields, ANSWERS) is None):
        asked, answer = question_and_answer(messages(fields[conversation], conversation))
        return with_system(asked, fields), answer
    task = first_instance(fields)
    name = given_name(task, ANSWERS) or ("output" if "instances" in fields else None)
    # `prompt` and `completion` belong together.
    found = question_in(fields, ("prompt", *QUESTIONS) if name == "completion" else QUESTIONS)
    if name is None or found is None:
        raise ValueError(f"not a supervised example: it needs {SFT_DIALECTS}; it has {keys(fields)}")
    return found, answer_to(found, task, name)


def parse_ranking(path: Path, number: int, fields: dict[str, Any]) -> SeedItem:
    """Parse a line of a file of preferences. Raise ValueError when it is not one, LeftOut when it prefers no answer. Of
    equal answers the one with the best rank stays."""
    asked, replies = ranking(fields)
    best: dict[str, float] = {}
    for text, rank in sorted(replies, key=lambda reply: reply[1]):
        best.setdefault(text, rank)
    places = {rank: place for place, rank in enumerate(sorted(set(best.values())))}
    if len(places) < 2:
        reason = "two of the ranked answers are the same" if len(best) < len(replies) else ""
        raise LeftOut(reason or "no answer is ranked above another")
    ranked = tuple(RankedReply(text, places[rank]) for text, rank in best.items())
    name = line_name(path, number)
    replies_to = RankedReplies(f"{SOURCE}-{name}", one_text(asked.prompt, asked.system), ranked)
    return SeedItem(name, asked.prompt, None, replies_to, system=asked.system)


def ranking(fields: dict[str, Any]) -> tuple[Question, list[tuple[str, float]]]:
    """Return the question of a preference, and its answers with their ranks (the lowest is the best)."""
    better, worse, ranked = (given_name(fields, names) for names in (CHOSEN, REJECTED, RANKED))
    if better is not None and (worse is not None or better == "chosen_response"):
        worse = worse or "rejected_response"
        asked, fields = chosen_question(fields, better, worse)
        good = answers_to(asked, fields, better)
    elif worse is not None and better is None:
        if not any(name in fields for name in (*CONVERSATIONS, *ANSWERS)):
            raise ValueError(f"`{worse}` needs what it is worse than, but `messages` is not a list, or it is missing")
        asked, answer = answered(fields)
        good = [answer]
    elif ranked is not None:
        found = question_in(fields)
        if found is None:
            raise ValueError(f"not a preference: it needs {QUESTIONS_SHOWN}; it has {keys(fields)}")
        given = listed(by_rows(fields[ranked]), ranked)
        several = [without_null(one) if isinstance(one, dict) else {} for one in given]
        order = next((name for name in ORDERS if all(name in one for one in several)), "rank")
        return found, [ranked_answer(found, one, ranked, order) for one in several]
    else:
        raise ValueError(f"not a preference: it needs {PREFERENCE_DIALECTS}; it has {keys(fields)}")
    return asked, [(text, 0.0) for text in good] + [(text, 1.0) for text in answers_to(asked, fields, worse)]


def chosen_question(fields: dict[str, Any], better: str, worse: str) -> tuple[Question, dict[str, Any]]:
    """Return what two answers answer: a field of its own, or else the beginning that both share; and the line with the
    bare answers."""
    found = question_in(fields)
    if found is not None:
        match fields[better]:
            case [dict(), dict(), *_] as turns:  # `prompt` may be one turn of them
                turns = messages(turns, better)
                asked = with_system(question_and_answer(turns)[0], fields)
                if Message("user", found.prompt) in turns and found.system in ("", asked.system):
                    return asked, fields
        return found, fields
    if isinstance(fields[better], str) and isinstance(fields.get(worse), str):
        texts = (text_field(fields, name, leading_blanks=True) for name in (better, worse))
        prompt, chosen, rejected = shared_beginning(*texts)
        return with_system(Question(prompt), fields), {**fields, better: chosen, worse: rejected}
    asked, _ = question_and_answer(messages(fields[better], better))
    return with_system(asked, fields), fields


def ranked_answer(to: Question, value: dict[str, Any], name: str, order: str) -> tuple[str, float]:
    """Parse an element of NeMo-RL's and UltraFeedback's `completions`, or Nectar's `answers`, to its text and rank, the
    negative of a score."""
    text = next((one for one in (name[:-1], "response") if one in value), None)
    if text is None or order not in value:
        wanted = "`rank` (or `score`), as the others have," if order == "rank" else f"`{order}`"
        raise ValueError(f"an element of `{name}` is not an object with {wanted} and `{name[:-1]}`")
    rank = value[order]
    if order != "rank":
        if type(rank) not in (int, float):
            raise ValueError(f"a completion has the `{order}` {rank!r}, not a number")
        return answer_to(to, value, text), -rank
    if isinstance(rank, float) and rank.is_integer():  # as tables have it
        rank = int(rank)
    if type(rank) is not int or rank < 0:
        raise ValueError(f"a completion has the rank {rank!r}, not an integer from 0")
    return answer_to(to, value, text), rank


def answers_to(to: Question, fields: dict[str, Any], name: str) -> list[str]:
    """Return the answer in a field, or the several ones in a list of texts or of conversations."""
    match fields.get(name):
        case [str(), *_] | [list(), *_] as several:
            return [answer_to(to, {name: one}, name) for one in several]
        case _:
            return [answer_to(to, fields, name)]


def answer_to(to: Question, fields: dict[str, Any], name: str) -> str:
    """Return the answer in a field that holds text, or messages that end with the assistant's, after the question's or
    without them. Blanks that begin it stay: in code they mean something."""
    if not isinstance(fields.get(name), list | dict):
        return text_field(fields, name, leading_blanks=True)
    turns = messages(fields[name], name)
    if len(turns) == 1 and turns[0].role == "assistant":
        return turns[0].content
    asked, answer = question_and_answer(turns)
    if asked.prompt != to.prompt or asked.system not in ("", to.system):
        raise ValueError(f"the messages before the answer in `{name}` are not those of the prompt")
    return answer


def keys(fields: dict[str, Any]) -> str:
    """Return the names of a line's fields, for a message."""
    return ", ".join(f"`{name}`" for name in fields) or "no fields"


def line_name(path: Path, number: int) -> str:
    """Return the id of a line's record."""
    return f"{path.name.partition('.')[0]}-{number:07d}"
