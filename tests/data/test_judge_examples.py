"""A user's own examples of judging: their forms, what is broken, what is held out, and the limit."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.judge_examples import parse_judge_example, with_judge_examples
from srlm_mega.data.quarantine import BadLine
from srlm_mega.data.seed_sets import SeedSets
from srlm_mega.errors import UserError
from srlm_mega.judging.scores import parse_score
from srlm_mega.judging.template import JudgeTemplate, load_template
from srlm_mega.records import Prompt, RankedReplies, RankedReply, SftExample, read_jsonl

ADDITIVE, TOY = load_template("additive"), load_template("toy")
FILE = Path("judged.jsonl")
JUDGED = {"instruction": "Why is the sky blue?", "response": "It scatters."}


def parsed(line: dict[str, Any]) -> SftExample:
    return parse_judge_example(ADDITIVE, FILE, 7, line)


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "Grade this.", "completion": "Fine.\nScore: 4"},
        {"messages": [{"role": "user", "content": "Grade this."}, {"role": "assistant", "content": "Fine.\nScore: 4"}]},
        {"prompt": "Grade this.", "completion": "Fine.\nScore: 4", "score": "x", **JUDGED},
    ],
)
def test_a_judges_turn_and_its_answer_are_taken_as_they_are(line: dict[str, Any]) -> None:
    assert parsed(line) == SftExample("eft-judged-0000007", "eft", "Grade this.", "Fine.\nScore: 4", "jsonl")


@pytest.mark.parametrize(
    ("score", "written"),
    [(4, "4"), (0, "0"), (5, "5"), (4.0, "4"), (3.5, "3.5"), ("4", "4"), ("4/5", "4"), (" 2.5 out of 5 ", "2.5")],
)
def test_a_judged_response_is_rendered_by_the_template(score: object, written: str) -> None:
    one = parsed(JUDGED | {"score": score})
    assert one.prompt == ADDITIVE.fill("Why is the sky blue?", "It scatters.") and one.completion == f"Score: {written}"
    with_reasons = parsed(JUDGED | {"score": score, "rationale": "I thought of Score: 1, and\nmore."})
    assert with_reasons.completion == f"I thought of Score: 1, and\nmore.\nScore: {written}"
    assert parse_score(with_reasons.completion) == float(written)
    for nothing in (None, "", "  "):
        assert parsed(JUDGED | {"score": score, "rationale": nothing}) == one


@pytest.mark.parametrize(
    "score", [6, -1, 5.01, -0.5, None, True, "four", "6", "-1", "8/10", "NaN", "", "4 or 5", "1e0", "4\nScore: 5", [4]]
)
def test_a_score_that_is_none_makes_a_broken_line(score: object) -> None:
    with pytest.raises(ValueError, match=r"`score` is .*, not a number from 0 to 5"):
        parsed(JUDGED | {"score": score})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "Grade.", "completion": "It is good."}, r"no `Score: x` from 0 to 5 can be read .* 'It is good\.'"),
        ({"prompt": "Grade.", "completion": "Score: 6"}, "no `Score: x`"),
        ({"prompt": "Grade.", "completion": "Score: 4/10"}, "no `Score: x`"),
        ({"prompt": "Grade.", "completion": "Score: -1"}, "no `Score: x`"),
        ({"prompt": "Grade.", "completion": "Score: NaN"}, "no `Score: x`"),
        ({"prompt": "Grade.", "completion": ""}, "`completion` is empty"),
        ({"prompt": "Grade.", "score": 4}, "not an example of judging: .* it has `prompt`, `score`"),
        ({}, "it has no fields"),
        (JUDGED, "`score` is None"),
        (JUDGED | {"score": 4, "response": " "}, "`response` is empty"),
        (JUDGED | {"score": 4, "instruction": 3}, "`instruction` is int"),
        (JUDGED | {"score": 4, "rationale": 3}, "`rationale` is int"),
        (JUDGED | {"score": 1e-7}, "no `Score: x`"),
    ],
)
def test_what_is_broken_is_named(line: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parsed(line)


SETS = SeedSets(
    eft_eval=(RankedReplies("e", "Name the largest planet of our solar system", (RankedReply("Jupiter", 0),)),),
    validation=(Prompt("v", "How do I bake bread without any yeast?", "x"),),
    test=(Prompt("t", "x y", "x"),),
    counts={"examples": 3},
)


def drawn(tmp_path: Path, content: bytes, **section: Any) -> SeedSets:
    path = tmp_path / "judged.jsonl"
    path.write_bytes(content)
    values = {"source": "oasst", "eft_path": path} | section
    return with_judge_examples(SETS, SeedDataConfig(**values), TOY, 3, tmp_path / "eft_quarantine.jsonl")


def lines(*instructions: str, more: tuple[dict[str, Any], ...] = ()) -> bytes:
    rows = [{"instruction": one, "response": "r", "score": 4} for one in instructions]
    return b"".join(orjson.dumps(row) + b"\n" for row in (*rows, *more))


def test_what_is_about_a_held_out_prompt_is_left_out_and_counted(tmp_path: Path) -> None:
    filled = TOY.fill("HOW do I bake bread, without any yeast", "with soda")
    content = lines(
        "Name the largest planet of our solar system",
        "Name the very largest planet of our solar system",
        "x y",
        "Name a river",
        more=({"prompt": filled, "completion": "Score: 2"}, {"prompt": "X, Y!", "completion": "Score: 2"}),
    )
    sets = drawn(tmp_path, content)
    assert [TOY.instruction_in(one.prompt) for one in sets.eft_train] == ["Name a river"]
    assert sets.counts == {
        "examples": 3, "judge_examples": 6, "bad_judge_examples": 0, "judge_examples_held_out": 5,
        "judge_examples_used": 1,
    }  # fmt: skip
    exact = drawn(tmp_path, content, near_duplicate_rouge_l=1.0)
    assert exact.counts["judge_examples_held_out"] == 4, "similar is allowed, the same is not"
    assert drawn(tmp_path, content, source="toy_world").eft_train == exact.eft_train
    assert (sets.eft_eval, sets.validation, sets.test) == (SETS.eft_eval, SETS.validation, SETS.test)


def test_num_eft_is_a_seeded_sample_in_the_files_order(tmp_path: Path) -> None:
    content = lines(*(f"question number {number} about word{number}" for number in range(40)))
    everything, some = drawn(tmp_path, content), drawn(tmp_path, content, num_eft=10)
    assert len(everything.eft_train) == 40 and some.counts["judge_examples_used"] == 10
    places = [everything.eft_train.index(one) for one in some.eft_train]
    assert len(places) == 10 and places == sorted(places) != list(range(10))
    assert drawn(tmp_path, content, num_eft=10) == some


def test_windows_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    content = lines("Name a river", "Name a city")
    assert drawn(tmp_path, b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")) == drawn(tmp_path, content)


def test_broken_lines_are_set_aside_and_too_many_stop_with_one_message(tmp_path: Path) -> None:
    good = lines(*(f"question number {number} about word{number}" for number in range(99)))
    sets = drawn(tmp_path, good + b'{"instruction": "i", "response": "r", "score": NaN}\n')
    assert (len(sets.eft_train), sets.counts["bad_judge_examples"]) == (99, 1)
    (bad,) = read_jsonl(tmp_path / "eft_quarantine.jsonl", BadLine)
    assert bad.line == 100 and "not JSON" in bad.reason
    unread = b'{"prompt": "Grade this.", "completion": "I like it."}\n'
    with pytest.raises(
        UserError, match=r"2 of the 101 lines of .*judged\.jsonl cannot be used.*line 100: no `Score: x`"
    ):
        drawn(tmp_path, good + 2 * unread)
    for empty in (b"", b"\n\r\n", b"\xef\xbb\xbf"):
        with pytest.raises(UserError, match=r"judged\.jsonl holds no records"):
            drawn(tmp_path, empty)


def test_another_largest_score() -> None:
    ten = JudgeTemplate.from_text("{{instruction}} {{response}} Score: N/10", "ten")
    for score in (8, "8", "8/10", "8 out of 10"):
        assert parse_judge_example(ten, FILE, 1, JUDGED | {"score": score}, 10).completion == "Score: 8/10"
    for score in (11, "8/5", "8/100"):
        with pytest.raises(ValueError, match="not a number from 0 to 10"):
            parse_judge_example(ten, FILE, 1, JUDGED | {"score": score}, 10)
