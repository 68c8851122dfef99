"""Dialects of supervised examples and preferences: what each line says, and what no line may say."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.conversations import flattened
from srlm_mega.data.formats import parse_example, parse_ranking, read_jsonl_sets
from srlm_mega.errors import UserError
from srlm_mega.records import Message

FILE = Path("file.jsonl")


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Alternating messages."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("line", "prompt", "target"),
    [
        ({"messages": turns("Hi?", "Hello.")}, "Hi?", "Hello."),
        ({"prompt": "Hi?", "completion": "Hello."}, "Hi?", "Hello."),
        ({"prompt": turns("Hi?"), "completion": turns("Hello.", first="assistant")}, "Hi?", "Hello."),
        (
            {"messages": turns("Hi?", "Hello.", "And?", "Bye.")},
            "User: Hi?\n\nAssistant: Hello.\n\nUser: And?",
            "Bye.",
        ),
        ({"messages": turns("Hi?", "Hello."), "source": "x", "id": 7}, "Hi?", "Hello."),
        ({"instruction": "Hi?", "output": "Hello."}, "Hi?", "Hello."),
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, "Add.\n\n1 and 2", "3"),
        (
            {"instruction": "Add.", "instances": [{"input": "1\n2", "output": "3"}, {"output": "4"}]},
            "Add.\n\n1\n2",
            "3",
        ),
        ({"instruction": "Hi?", "instances": [{"input": "", "output": "Hello."}]}, "Hi?", "Hello."),
        ({"instruction": "Hi?", "input": "<noinput>", "output": "Hello."}, "Hi?", "Hello."),
        ({"instruction": "Hi?", "input": None, "output": "Hello."}, "Hi?", "Hello."),
    ],
)
def test_supervised_examples(line: dict[str, Any], prompt: str, target: str) -> None:
    item = parse_example(FILE, 12, line)
    assert (item.id, item.prompt, item.target, item.ranked) == ("file-0000012", prompt, target, ())


@pytest.mark.parametrize(
    ("line", "system", "prompt"),
    [
        ({"messages": [SYSTEM, *turns("Hi?", "Hello.")]}, "Be brief.", "Hi?"),
        ({"messages": [SYSTEM, SYSTEM, *turns("Hi?", "Hello.")]}, "Be brief.\n\nBe brief.", "Hi?"),
        (
            {"messages": [SYSTEM, *turns("Hi?", "Yes?", "Well.", "Bye.")]},
            "Be brief.",
            "User: Hi?\n\nAssistant: Yes?\n\nUser: Well.",
        ),
        ({"prompt": [SYSTEM, *turns("Hi?")], "completion": "Hello."}, "Be brief.", "Hi?"),
        ({"system": "Be brief.", "prompt": "Hi?", "completion": "Hello."}, "Be brief.", "Hi?"),
        ({"system": "Be long.", "messages": [SYSTEM, *turns("Hi?", "Hello.")]}, "Be brief.", "Hi?"),
        ({"system": None, "instruction": "Hi?", "output": "Hello."}, "", "Hi?"),
        ({"system": " ", "messages": turns("Hi?", "Hello.")}, "", "Hi?"),
    ],
)
def test_a_system_message_stays_apart(line: dict[str, Any], system: str, prompt: str) -> None:
    item = parse_example(FILE, 12, line)
    assert (item.system, item.prompt) == (system, prompt)


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": [SYSTEM, *turns("Hi?")], "chosen": "Good.", "rejected": "Bad."},
        {"system": "Be brief.", "prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."},
        {"messages": [SYSTEM, *turns("Hi?", "Good.")], "rejected_response": "Bad."},
        {"chosen": [SYSTEM, *turns("Hi?", "Good.")], "rejected": [SYSTEM, *turns("Hi?", "Bad.")]},
    ],
)
def test_a_ranking_has_the_system_message_in_its_prompt(line: dict[str, Any]) -> None:
    item = parse_ranking(FILE, 3, line)
    assert (item.system, item.prompt) == ("Be brief.", "Hi?")
    assert item.first_turn is not None and item.first_turn.prompt == "System: Be brief.\n\nUser: Hi?"


CHOSEN, REJECTED = turns("Good.", first="assistant"), turns("Bad.", first="assistant")


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."},
        {"prompt": turns("Hi?"), "chosen": CHOSEN, "rejected": REJECTED},
        {"prompt": "Hi?", "chosen": turns("Hi?", "Good."), "rejected": turns("Hi?", "Bad.")},
        {"chosen": turns("Hi?", "Good."), "rejected": turns("Hi?", "Bad.")},
        {"messages": turns("Hi?", "Good."), "rejected_response": "Bad."},
        {"prompt": "Hi?", "chosen_response": "Good.", "rejected_response": "Bad.", "chosen_reward": 1.0},
        {
            "context": turns("Hi?"),
            "completions": [{"rank": 1, "completion": REJECTED}, {"rank": 0, "completion": CHOSEN}],
        },
    ],
)
def test_preferences(line: dict[str, Any]) -> None:
    item = parse_ranking(FILE, 3, line)
    assert (item.prompt, item.target) == ("Hi?", None)
    (ranked,) = item.ranked
    assert ranked.prompt == "Hi?" and [(one.text, one.rank) for one in ranked.replies] == [("Good.", 0), ("Bad.", 1)]


def test_more_than_two_completions_keep_their_ranks() -> None:
    completions = [{"rank": rank, "completion": turns(f"answer {rank}", first="assistant")} for rank in (2, 0, 1)]
    (ranked,) = parse_ranking(FILE, 1, {"context": turns("Hi?", "Yes?", "Well."), "completions": completions}).ranked
    assert ranked.prompt == "User: Hi?\n\nAssistant: Yes?\n\nUser: Well."
    assert [(one.text, one.rank) for one in ranked.replies] == [(f"answer {rank}", rank) for rank in range(3)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"question": "Hi?", "answer": "Hello."}, "it has `question`, `answer`"),
        ({"instruction": "Hi?"}, "it has `instruction`"),
        ({"instruction": "Hi?", "output": ""}, "`output` is empty"),
        ({"instruction": "Hi?", "input": 3, "output": "Hello."}, "`input` is int"),
        ({"instruction": "Hi?", "instances": [{"input": "x"}]}, "`output` is missing"),
        ({"instruction": "Hi?", "instances": {}}, "`instances` is not a list"),
        ({"system": 3, "prompt": "Hi?", "completion": "Hello."}, "`system` is int"),
        ({}, "it has no fields"),
        ({"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."}, "not a supervised example"),
        ({"messages": []}, "`messages` is not a list, or it is empty"),
        ({"messages": "Hi?"}, "`messages` is not a list"),
        ({"messages": turns("Hi?")}, "does not end with a user's and an assistant's"),
        ({"messages": turns("Hi?", "Hello.", "And?")}, "does not end with"),
        ({"messages": [SYSTEM, *CHOSEN]}, "does not end with"),
        ({"messages": [{"role": "tool", "content": "x"}, *turns("Hi?", "Yes.")]}, "the role 'tool'"),
        ({"messages": [{"role": "user"}]}, "`content` is missing"),
        ({"messages": ["Hi?"]}, "an element of `messages` is not a message"),
        ({"prompt": "Hi?", "completion": ""}, "`completion` is empty"),
        ({"prompt": turns("Hi?", "Hello."), "completion": "x"}, "the last message of `prompt` is the assistant's"),
    ],
)
def test_what_is_no_supervised_example_is_named(line: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_example(FILE, 1, line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "Hi?", "completion": "Hello."}, "not a preference"),
        ({"prompt": "Hi?", "chosen": "Same.", "rejected": "Same."}, "two of the ranked answers are the same"),
        ({"prompt": "Hi?", "chosen": turns("Ho?", "A"), "rejected": turns("Hi?", "B")}, "in `chosen` are not those"),
        ({"chosen": turns("Hi?", "Good."), "rejected": turns("Ho?", "Bad.")}, "in `rejected` are not those"),
        ({"context": turns("Hi?"), "completions": [{"rank": 0, "completion": CHOSEN}]}, "no answer is ranked above"),
        ({"context": turns("Hi?"), "completions": [{"rank": "1", "completion": CHOSEN}]}, "the rank '1'"),
        ({"context": turns("Hi?"), "completions": ["Good."]}, "not an object with `rank`"),
        ({"prompt": "Hi?", "chosen_response": "Good."}, "`rejected_response` is missing"),
        ({"rejected_response": "Bad."}, "`messages` is not a list"),
    ],
)
def test_what_is_no_preference_is_named(line: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_ranking(FILE, 1, line)


def test_a_lone_user_turn_is_itself() -> None:
    assert flattened([Message("user", "Hi?")]) == "Hi?"
    assert flattened([Message("system", "Hi?")]) == "System: Hi?"


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    return path


def test_seed_sets_from_two_files(tmp_path: Path) -> None:
    def words(name: str, number: int) -> str:
        return " ".join(f"{name}{number}{part}" for part in "abcd")

    examples = write(
        tmp_path / "sft.jsonl", [{"prompt": words("s", n), "completion": f"answer {n}"} for n in range(40)]
    )
    preferences = write(
        tmp_path / "dpo.jsonl", [{"prompt": words("p", n), "chosen": "a", "rejected": "b"} for n in range(30)]
    )
    section = SeedDataConfig(
        source="jsonl", path=examples, ranked_path=preferences, num_eft_eval=10, num_validation=5, num_test=4,
        num_eft_sources=8, num_ift=20,
    )  # fmt: skip
    sets = read_jsonl_sets(section, 0, tmp_path / "bad.jsonl")
    sizes = (len(sets.ift), len(sets.eft_eval), len(sets.eft_sources), len(sets.validation), len(sets.test))
    assert sizes == (20, 5, 8, 5, 4)
    assert all(example.prompt.startswith("s") and example.completion.startswith("answer") for example in sets.ift)
    assert all(one.prompt.startswith("p") for one in (*sets.eft_eval, *sets.eft_sources))
    assert sets.counts["examples"] == 40 and sets.counts["rankings"] == 30 and sets.counts["bad_lines"] == 0
    write(preferences, [{"prompt": "x", "chosen": "a"}])
    with pytest.raises(UserError, match=r"1 of the 1 lines of .*dpo\.jsonl"):
        read_jsonl_sets(section, 0, tmp_path / "bad.jsonl")
    assert (tmp_path / "ranked_bad.jsonl").exists()


def test_one_system_message_for_all_makes_no_two_lines_alike(tmp_path: Path) -> None:
    """It is longer than the questions, which would be near-duplicates with it in them."""
    system = " ".join(f"rule{number}" for number in range(60))

    def words(name: str, number: int) -> str:
        return " ".join(f"{name}{number}{part}" for part in "abcd")

    examples = [{"system": system, "prompt": words("s", n), "completion": "a"} for n in range(8)]
    rankings = [{"system": system, "prompt": words("p", n), "chosen": "a", "rejected": "b"} for n in range(8)]
    section = SeedDataConfig(
        source="jsonl", path=write(tmp_path / "sft.jsonl", examples), num_ift=20, num_validation=3,
        ranked_path=write(tmp_path / "dpo.jsonl", rankings), num_eft_eval=4, num_eft_sources=4,
    )  # fmt: skip
    sets = read_jsonl_sets(section, 0, tmp_path / "bad.jsonl")
    assert (len(sets.eft_eval), len(sets.eft_sources), len(sets.validation)) == (2, 4, 3)
    assert len(sets.ift) > 4 and sets.counts["near_duplicates"] == 0
    assert {one.system for one in (*sets.ift, *sets.validation)} == {system}
    assert all(one.prompt.startswith("System: rule0") for one in (*sets.eft_eval, *sets.eft_sources))


def test_the_real_seed_tasks_are_examples_with_their_input(shared_data: Path) -> None:
    lines = (shared_data / "self_instruct_seed_tasks.jsonl").read_bytes().splitlines()
    items = [parse_example(FILE, number, orjson.loads(line)) for number, line in enumerate(lines)]
    assert len(items) == 175 and all(item.target for item in items)
    assert sum("\n\n" in item.prompt for item in items) >= 125
