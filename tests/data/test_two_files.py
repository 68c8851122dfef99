"""Seed sets from a file of examples and a file of preferences: nothing is lost in silence."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.formats import read_jsonl_sets
from srlm_mega.data.seed_sets import SeedSets
from srlm_mega.errors import UserError

Line = dict[str, Any]


def write(path: Path, lines: Sequence[Line]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    return path


def asked(name: str, number: int) -> str:
    return " ".join(f"{name}{number}{part}" for part in "abcd")


def examples(name: str, number: int) -> list[Line]:
    return [{"prompt": asked(name, n), "completion": f"answer to {name}{n}"} for n in range(number)]


def rankings(name: str, number: int) -> list[Line]:
    return [
        {"prompt": asked(name, n), "chosen": f"good {name}{n}", "rejected": f"bad {name}{n}"} for n in range(number)
    ]


def draw(tmp_path: Path, supervised: Path, ranked: Path, **sizes: Any) -> SeedSets:
    wanted = {"num_ift": 100, "num_eft_eval": 10, "num_validation": 4, "num_test": 2, "num_eft_sources": 6} | sizes
    section = SeedDataConfig(source="jsonl", path=supervised, ranked_path=ranked, **wanted)
    return read_jsonl_sets(section, 0, tmp_path / "quarantine.jsonl")


@pytest.mark.parametrize(
    ("supervised", "ranked"),
    [("sft/train.jsonl", "dpo/train.jsonl"), ("mine.sft.jsonl", "mine.dpo.jsonl"), ("ranked-a.jsonl", "a.jsonl")],
)
def test_files_of_one_name_lose_nothing(tmp_path: Path, supervised: str, ranked: str) -> None:
    sets = draw(tmp_path, write(tmp_path / supervised, examples("s", 20)), write(tmp_path / ranked, rankings("p", 20)))
    assert (sets.counts["usable"], sets.counts["with_ranking"], sets.counts["duplicate_ids"]) == (40, 20, 0)
    ids = [one.id for one in (*sets.ift, *sets.eft_eval, *sets.eft_sources, *sets.validation, *sets.test)]
    assert len(set(ids)) == len(ids)
    assert all(one.id.startswith("jsonl-example-") for one in sets.ift)
    assert all(one.id.startswith("jsonl-ranked-") for one in (*sets.eft_eval, *sets.eft_sources))


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line,
        lambda line: line | {"prompt": line["prompt"].upper() + "?"},
        lambda line: line | {"prompt": [SYSTEM, {"role": "user", "content": line["prompt"]}]},
    ],
    ids=["the same", "other letters", "another system message"],
)
def test_a_prompt_of_both_files_has_its_answer_and_its_ranking(tmp_path: Path, change: Any) -> None:
    """The answers stay with the prompt that they were given to, and so do the rankings."""
    supervised = write(tmp_path / "sft.jsonl", examples("s", 30))
    ranked = write(tmp_path / "dpo.jsonl", [*map(change, rankings("s", 20)), *rankings("p", 5)])
    sets = draw(tmp_path, supervised, ranked)
    counts = sets.counts
    assert (counts["merged"], counts["duplicate_texts"], counts["usable"]) == (20, 0, 35)
    assert (counts["with_target"], counts["with_ranking"]) == (30, 25)
    assert (len(sets.eft_eval), len(sets.eft_sources), len(sets.validation), len(sets.test)) == (5, 6, 4, 2)
    asked_for_ranks = {change(line)["prompt"] if isinstance(change(line)["prompt"], str) else
                       f"System: Be brief.\n\nUser: {line['prompt']}" for line in rankings("s", 20)}  # fmt: skip
    plain = {line["prompt"] for line in rankings("p", 5)}
    for one in (*sets.eft_eval, *sets.eft_sources):
        assert one.prompt in asked_for_ranks | plain
        assert one.replies[0].text.removeprefix("good ") == one.replies[1].text.removeprefix("bad ")
    assert all(one.completion == f"answer to {one.prompt.split('a ')[0]}" and not one.system for one in sets.ift)
    drawn = [one.prompt for one in (*sets.ift, *sets.eft_eval, *sets.eft_sources)]
    drawn += [one.text for one in (*sets.validation, *sets.test)]
    first_words = [text.casefold().removeprefix("system: be brief.\n\nuser: ").split()[0] for text in drawn]
    assert len(set(first_words)) == len(first_words), "no prompt is in two sets"


def test_one_ms_swift_file_may_be_given_for_both(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": asked("m", n)}, {"role": "assistant", "content": "yes"}] for n in range(30)]
    path = write(tmp_path / "swift.jsonl", [{"messages": one, "rejected_response": "no"} for one in turns])
    sets = draw(tmp_path, path, path)
    assert (sets.counts["merged"], sets.counts["usable"], sets.counts["duplicate_texts"]) == (30, 30, 0)
    assert (len(sets.eft_eval), len(sets.eft_sources), len(sets.ift)) == (5, 6, 30 - 5 - 6 - 4 - 2)
    assert {one.completion for one in sets.ift} == {"yes"}
    assert all([reply.text for reply in one.replies] == ["yes", "no"] for one in sets.eft_sources)


def test_a_failed_draw_says_what_was_left_out_and_keeps_the_counts(tmp_path: Path) -> None:
    many = examples("s", 200)
    supervised = write(tmp_path / "sft.jsonl", [*many, *many[:7], {"prompt": "no answer"}])
    alike = [line | {"prompt": f"{asked('q', 0)} {asked('q', 1)} {n}"} for n, line in enumerate(rankings("p", 12))]
    ranked = write(tmp_path / "dpo.jsonl", [*alike, *rankings("p", 3)])
    with pytest.raises(UserError) as error:
        draw(tmp_path, supervised, ranked, num_eft_eval=40)
    message = str(error.value)
    assert f"{supervised} and {ranked} have 215 usable prompts, 15 of them with ranked replies" in message
    for said in (
        "lines that cannot be used (quarantine.jsonl): 1",
        "repeated prompts: 7",
        "like one that was drawn (seed_data.near_duplicate_rouge_l): 11",
    ):
        assert said in message
    assert "8 of 40 replies" in message and str(tmp_path / "counts.json") in message
    counts = orjson.loads((tmp_path / "counts.json").read_bytes())
    kept = ("examples", "bad_lines", "rankings", "duplicate_texts", "near_duplicates", "usable", "eft_eval_items")
    assert [counts[name] for name in kept] == [207, 1, 15, 7, 11, 215, 8]


def test_examples_that_are_labelled_bad_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = [line | {"label": number % 2 == 0} for number, line in enumerate(examples("s", 40))]
    sets = draw(tmp_path, write(tmp_path / "kto.jsonl", lines), write(tmp_path / "dpo.jsonl", rankings("p", 20)))
    assert (sets.counts["examples"], sets.counts["examples_labelled_bad"]) == (20, 20)
    good = {line["completion"] for line in lines if line["label"]}
    assert sets.ift and {one.completion for one in sets.ift} <= good
