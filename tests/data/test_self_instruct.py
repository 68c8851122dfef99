"""Few-shot text, cutting a continuation into tasks, and the filters."""

import string
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_mega.data.prompt_files import read_prompts
from srlm_mega.data.self_instruct import (
    RejectReason,
    TaskFilter,
    few_shot_prompt,
    parse_tasks,
)
from srlm_mega.errors import UserError


def task_filter(*seeds: str, rouge_l_max: float = 0.7) -> TaskFilter:
    return TaskFilter(min_words=4, max_words=150, rouge_l_max=rouge_l_max, seeds=seeds)


def test_the_few_shot_text_numbers_the_shots_and_the_next() -> None:
    assert few_shot_prompt(["Do  this.\nNow.", "Do that."]) == (
        "Come up with a series of tasks:\n1. Do this. Now.\n2. Do that.\n3."
    )


@pytest.mark.parametrize(
    ("continuation", "truncated", "tasks"),
    [
        (" Name a bird.\n10. Name a fish.\n11. Name", True, ["Name a bird.", "Name a fish."]),
        (" Name a bird.\n10. Name a fish.", False, ["Name a bird.", "Name a fish."]),
        (" Name a bird. 10. Name a fish. 11 . Name a", True, ["Name a bird.", "Name a fish."]),
        (" Name a bird.\n10.", False, ["Name a bird."]),
        (" Name a bird.\n10.", True, ["Name a bird."]),
        (" Name a bird, then 20. Stop.\n10. Name a fish.", False, ["Name a bird, then 20. Stop.", "Name a fish."]),
        (" Name a bird.\n\nThe robin is a bird.\n\n10. Name a fish.", False, ["Name a bird.", "Name a fish."]),
        (" Round 3.5 to a whole number.", False, ["Round 3.5 to a whole number."]),
        (" Name a\n bird.\n10. Name a fish.", False, ["Name a bird.", "Name a fish."]),
        (" Name", True, []),
        ("", False, []),
        ("\n\n", True, []),
        ("10. 11. 12.", False, []),
    ],
)
def test_a_continuation_is_cut_into_tasks(continuation: str, truncated: bool, tasks: list[str]) -> None:
    assert parse_tasks(continuation, truncated) == tasks


@given(st.lists(st.text(string.ascii_letters + " .,?", min_size=1).filter(str.strip), min_size=1, max_size=12))
def test_tasks_come_back_as_they_were_listed(tasks: list[str]) -> None:
    one_line = [" ".join(task.split()) for task in tasks]
    text = few_shot_prompt(tasks).removeprefix("Come up with a series of tasks:")
    assert parse_tasks(text, truncated=False) == one_line
    assert parse_tasks(text, truncated=True) == one_line, "the open last number is what is dropped"


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("Name three birds", "too_short"),
        ("Name three red birds", None),
        ("word " * 151, "too_long"),
        ("word " * 150, None),
        ("Describe this image in detail", "keyword"),
        ("Describe these Pictures in detail", "keyword"),
        ("Tell me how to go to the moon", "keyword"),
        ("Explain the plot of Hamlet briefly", "keyword"),
        ("Explain imagery and filenames and mapping", None),
        ("Draw a cat for me", "keyword"),
        ("Write a program that sorts numbers", "program"),
        ("write a PROGRAM that sorts numbers", "program"),
        ("Write a programme for the concert", "program"),
        ("- name three red birds", "starts_with_punctuation"),
        ('"Name" three red birds', "starts_with_punctuation"),
        ("Énumère trois oiseaux rouges", "starts_non_ascii"),
        ("请 列出 三种 鸟", "starts_non_ascii"),
    ],
)
def test_each_rule_of_form(task: str, reason: RejectReason | None) -> None:
    tasks = task_filter()
    assert tasks.reason_against(task) == reason
    assert tasks.accept(task) is (reason is None)
    assert dict(tasks.rejected) == ({reason: 1} if reason else {})


def test_similar_tasks_are_rejected_against_seeds_and_accepted_ones() -> None:
    tasks = task_filter("Name three red birds of Europe")
    assert tasks.reason_against("name THREE red  birds of europe") == "duplicate"
    # 6 and 6 words, 5 in common order: F1 = 10 / 12.
    assert tasks.reason_against("Name three blue birds of Europe") == "similar"
    assert tasks.accept("Write a poem about the sea")
    assert tasks.reason_against("Write a poem about the sky") == "similar"
    assert not tasks.accept("Write a poem about the sea")
    assert (tasks.accepted, dict(tasks.rejected)) == (1, {"duplicate": 1})


def test_the_threshold_itself_is_still_allowed() -> None:
    # 5 and 5 words, 4 in common order: F1 = 0.8.
    assert task_filter("a b c d e", rouge_l_max=0.8).accept("a b c d x")
    assert not task_filter("a b c d e", rouge_l_max=0.79).accept("a b c d x")


def test_at_threshold_one_only_exact_duplicates_go() -> None:
    tasks = task_filter("list 4 animals upper", rouge_l_max=1.0)
    assert not tasks.accept("list 4 animals upper")
    assert tasks.accept("list 4 animals, upper")
    assert tasks.accept("list 5 animals upper")


def test_prompts_are_read_from_both_forms_and_broken_lines_stop(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"id": "x", "instruction": "Name a bird."}\n\n{"text": "Name a fish."}\n')
    prompts = list(read_prompts(path, tmp_path / "bad.jsonl"))
    assert [(prompt.id, prompt.text, prompt.source) for prompt in prompts] == [
        ("tasks-000001", "Name a bird.", "tasks.jsonl"),
        ("tasks-000003", "Name a fish.", "tasks.jsonl"),
    ]
    path.write_text('{"instruction": "Name a bird."}\n{"fish": "Name a fish."}\n')
    with pytest.raises(UserError, match=r"line 2: not a prompt: it needs `prompt`, .* it has `fish`"):
        list(read_prompts(path, tmp_path / "bad.jsonl"))


def test_the_real_seed_tasks(shared_data: Path, tmp_path: Path) -> None:
    prompts = list(read_prompts(shared_data / "self_instruct_seed_tasks.jsonl", tmp_path / "bad.jsonl"))
    assert len(prompts) == len({prompt.id for prompt in prompts}) == 175
    tasks = task_filter()
    assert sum(tasks.accept(prompt.text) for prompt in prompts) == tasks.accepted > 150
    assert not any(tasks.accept(prompt.text) for prompt in prompts), "all are known now"


def test_a_task_keeps_its_input(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(
        '{"instruction": "Sum up.", "instances": [{"input": "A long story.", "output": "x"}, {"input": "No."}]}\r\n'
        '{"instruction": "Translate.", "input": " bonjour ", "output": "hello"}\r\n'
        '{"instruction": "Name a bird.", "input": "", "output": "owl"}\r\n'
        '{"instruction": "Name a fish.", "instances": []}\r\n'
        '{"text": "Name a tree.", "system": "Be brief."}\r\n'
    )
    prompts = list(read_prompts(path, tmp_path / "bad.jsonl"))
    assert [prompt.text for prompt in prompts] == [
        "Sum up.\n\nA long story.", "Translate.\n\nbonjour", "Name a bird.", "Name a fish.", "Name a tree.",
    ]  # fmt: skip
    assert [prompt.system for prompt in prompts] == ["", "", "", "", "Be brief."]
    assert prompts[-1].question == "System: Be brief.\n\nUser: Name a tree."


def test_of_the_real_seed_tasks_125_have_an_input(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "self_instruct_seed_tasks.jsonl"
    prompts = list(read_prompts(path, tmp_path / "bad.jsonl"))
    tasks = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    with_input = [
        (prompt.text, given)
        for prompt, task in zip(prompts, tasks, strict=True)
        if (given := task["instances"][0]["input"].strip())
    ]
    assert len(with_input) == 125 and all(text.endswith(f"\n\n{given}") for text, given in with_input)
