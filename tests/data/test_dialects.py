"""Lines as the field's tools write them, and what they say: dialects.jsonl, which grows."""

import json
from pathlib import Path
from typing import Any

import pytest

from srlm_mega.data.formats import parse_example, parse_ranking
from srlm_mega.data.prompt_files import read_prompts
from srlm_mega.data.quarantine import LeftOut, UserLines
from srlm_mega.data.seed_sets import SeedItem

CORPUS = [json.loads(line) for line in (Path(__file__).parent / "dialects.jsonl").read_text("utf-8").splitlines()]
GOOD = [one for one in CORPUS if "error" not in one]


def read(folder: Path, line: dict[str, Any], reader: str, strip_template: bool = False) -> tuple[list[SeedItem], Any]:
    """The line's item, if it has one, and the reader, which has counted it."""
    path = folder / "file.jsonl"
    path.write_text(json.dumps(line) + "\n")
    parse = parse_example if reader == "example" else parse_ranking
    lines = UserLines(path, lambda number, fields: parse(path, number, fields), None, strip_template)
    return list(lines), lines


def says(one: dict[str, Any], item: SeedItem) -> bool:
    ranked = [[reply.text, reply.rank] for turn in item.ranked for reply in turn.replies]
    return (item.prompt, item.system, item.target, ranked) == (
        one["prompt"], one["system"], one.get("answer"), one.get("ranked", []),
    )  # fmt: skip


@pytest.mark.parametrize("one", GOOD, ids=lambda one: one["what"])
def test_a_line_of_the_corpus(one: dict[str, Any], tmp_path: Path) -> None:
    reader = "ranking" if "ranked" in one else "example"
    for strip_template in (False, True):
        (item,), lines = read(tmp_path, one["line"], reader, strip_template)
        assert says(one, item), item
        assert lines.templated == 0


@pytest.mark.parametrize("one", [one for one in CORPUS if "error" in one], ids=lambda one: one["what"])
def test_what_cannot_be_read_is_named(one: dict[str, Any], tmp_path: Path) -> None:
    parse = parse_example if one["reader"] == "example" else parse_ranking
    line = {name: value for name, value in one["line"].items() if value is not None}
    with pytest.raises(ValueError, match=one["error"]) as error:
        parse(tmp_path, 1, line)
    assert isinstance(error.value, LeftOut) == (one["reader"] == "left out")


@pytest.mark.parametrize("one", [one for one in GOOD if len(one["line"].keys() - {"chosen", "rejected"})], ids=str)
def test_a_question_is_a_prompt_under_the_same_names(one: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    names = ("completions", "answers", "chosen", "rejected")
    path.write_text(json.dumps({name: value for name, value in one["line"].items() if name not in names}) + "\n")
    if "Nectar" in one["what"]:  # its texts with speakers are read beside its answers only
        return
    (prompt,) = read_prompts(path, None)
    assert (prompt.text, prompt.system) == (one["prompt"], one["system"])


@pytest.mark.parametrize("prompt", ["Hi?", "And?", "What?"])
def test_a_prompt_may_be_a_turn_of_the_conversations_that_answer_it(prompt: str, tmp_path: Path) -> None:
    said = ["system: Be brief.", "user: Hi?", "assistant: Yes?", "user: And?"]
    turns = [dict(zip(("role", "content"), one.split(": "), strict=True)) for one in said]
    answers = {name: [*turns, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    if prompt == "What?":
        with pytest.raises(ValueError, match="are not those of the prompt"):
            parse_ranking(tmp_path, 1, {"prompt": prompt, **answers})
        return
    item = parse_ranking(tmp_path, 1, {"prompt": prompt, **answers})
    assert (item.prompt, item.system) == ("User: Hi?\n\nAssistant: Yes?\n\nUser: And?", "Be brief.")
    with pytest.raises(ValueError, match="are not those of the prompt"):
        parse_ranking(tmp_path, 1, {"prompt": prompt, "system": "Be long.", **answers})


def test_lines_without_a_preference_are_counted_and_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "dpo.jsonl"
    same = [{"prompt": f"p{number}", "chosen": "a", "rejected": "a"} for number in range(50)]
    good = [{"prompt": f"q{number}", "chosen": "a", "rejected": "b"} for number in range(50)]
    path.write_text("".join(json.dumps(line) + "\n" for line in same + good))
    lines = UserLines(path, lambda number, fields: parse_ranking(path, number, fields), tmp_path / "bad.jsonl")
    assert len(list(lines)) == lines.good == lines.left_out == 50
    assert lines.bad == 0 and not (tmp_path / "bad.jsonl").exists()
