"""Chat templates in a user's texts: known at their ends, taken off whole or refused, never two of them."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.formats import read_jsonl_sets
from srlm_mega.data.oasst import read_oasst
from srlm_mega.data.prompt_files import read_prompts
from srlm_mega.data.quarantine import BadLine, UserLines, text_field
from srlm_mega.data.template_marks import LeftInside, unwrapped
from srlm_mega.errors import UserError
from srlm_mega.records import read_jsonl

Q = "Which bird\n\nsings [well]?"
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
# A prompt in the templates of the field, with and without a system block, and as people's files spell them.
PROMPTS = [
    f"<s>[INST] {Q} [/INST]",
    f"<s> [INST]{Q}[/INST] ",
    f"[ INST ] {Q} [ /INST ]",
    f"[inst] {Q} [/inst]",
    f"\ufeff<s>[INST]\r\n{Q}\r\n[/INST]\r\n",
    f"<s>[INST] <<SYS>>\nBe brief. Be kind.\n<</SYS>>\n\n{Q} [/INST]",
    f"<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]{Q}[/INST]",
    f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n",
    f"<|im_start|>system\nYou are a helpful AI.<|im_end|>\n<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant",
    f"<|IM_START|> user\n{Q} <|IM_END|>",
    f"<|begin_of_text|>{LLAMA3.format('system')}Cutting Knowledge Date: 2023<|eot_id|>{LLAMA3.format('user')}{Q}"
    f"<|eot_id|>{LLAMA3.format('assistant')}",
    f"{LLAMA3.format('user')}{Q}<|eot_id|>",
    f"<|begin_of_text|>{Q}",
    f"<|system|>\nBe brief.</s>\n<|user|>\n{Q}</s>\n<|assistant|>\n",
    f"<|system|>\nBe brief.<|end|>\n<|user|>\n{Q}<|end|>\n<|assistant|>",
    f"<|prompter|>{Q}<|endoftext|><|assistant|>",
    f"<bos><start_of_turn>user\n{Q}<end_of_turn>\n<start_of_turn>model\n",
    f"<extra_id_0>System\n\n<extra_id_1>User\n{Q}\n<extra_id_1>Assistant\n",
    f"<extra_id_0>System\nBe brief.\n<extra_id_1>User\n{Q}\n<extra_id_1>Assistant\n<extra_id_2>quality:4,humor:0\n",
    f"### Instruction:\n{Q}\n\n### Response:",
    f"{ALPACA}### Instruction:\n{Q}\n\n### Response:\n",
    f"{VICUNA}USER: {Q} ASSISTANT:",
    f"USER: {Q}\nASSISTANT:",
    f"### Human: {Q}\n### Assistant:",
    f"\n\nHuman: {Q}\n\nAssistant:",
    f"User: {Q}\n\nAssistant:",
    f"<｜begin▁of▁sentence｜><｜User｜>{Q}<｜Assistant｜>",
    f"<s>{Q}</s>",
    f"<s><s>{Q}",
]
ANSWERS = [
    "{}</s>", "{} </s></s>\n", "[/INST] {} </s>", "<|im_start|>assistant\n{}<|im_end|>\n", "{}<|eot_id|>",
    "{}<end_of_turn><eos>", "<|assistant|>\n{}</s>", "### Response:\n{}", "ASSISTANT: {}</s>",
    "<extra_id_1>Assistant\n{}\n<extra_id_1>", "<extra_id_2>quality:4,toxicity:0\n{}", "{}<|endoftext|>",
]  # fmt: skip
PLAIN = [
    "What does [INST] mean in Llama 2's template?", "Use <s> and </s> for strikethrough.", "Say <|im_end|> twice.",
    "System: Be brief.\n\nUser: Hi?", "User: Hi?\n\nAssistant: Yes?\n\nUser: Well.", "user: root", "The USER: field",
    "### Instructions: read them", "#### Response:\nnone", "Human beings: an essay", "a <| b |> c is F#, isn't it", "",
    "[1, 2]", "<b>bold</b>", "Response: yes", "A chat between a curious user and a robot", "Assistants: 3",
]  # fmt: skip
SEVERAL_TURNS = [
    ("<s>[INST] a [/INST] b </s><s>[INST] c [/INST]", "[/INST]"),
    ("[INST] a [/INST] b", "[/INST]"),
    ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>", "<|im_end|>"),
    ("USER: a ASSISTANT: b USER: c ASSISTANT:", "ASSISTANT:"),
    ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "Assistant:"),
    ("### Instruction:\na\n\n### Response:\nb", "### Response:"),
    ("<extra_id_1>User\na\n<extra_id_1>Assistant\nb", "<extra_id_1>Assistant"),
    ("<s>a</s><s>b</s>", "</s>"),
]


@pytest.mark.parametrize("text", PROMPTS)
def test_a_template_is_taken_off_whole(text: str) -> None:
    found = unwrapped(text)
    assert found.text == Q and found.marks
    assert unwrapped(Q).marks == ()


@pytest.mark.parametrize("form", ANSWERS)
def test_so_it_is_off_an_answer(form: str) -> None:
    assert unwrapped(form.format(Q)).text == Q


def test_alpacas_input_follows_the_instruction() -> None:
    text = f"{ALPACA}### Instruction:\nAdd.\n\n### Input:\n1\n2\n\n### Response:"
    assert unwrapped(text).text == "Add.\n\n1\n2"
    assert unwrapped("### Instruction:\nAdd.\n\n### Input:\n\n### Response:").text == "Add."


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_text_is_untouched(text: str) -> None:
    assert (unwrapped(text).text, unwrapped(text).marks) == (text, ())


@pytest.mark.parametrize(("text", "mark"), SEVERAL_TURNS)
def test_several_turns_in_one_text_are_no_turn(text: str, mark: str) -> None:
    assert unwrapped(text).text == LeftInside(mark)


def test_another_templates_mark_inside_is_ordinary_text() -> None:
    assert unwrapped("<s>[INST] What is <|im_end|>? [/INST]").text == "What is <|im_end|>?"


MARKS = st.sampled_from(
    ["<s>", "</s>", "[INST]", "[/INST]", "<|im_end|>", "<<SYS>>", "USER:", "### Input:", "x", " ", "\n"]
)


@given(st.lists(MARKS).map("".join))
def test_what_is_left_has_no_mark_at_its_ends(text: str) -> None:
    left = unwrapped(text).text
    assert isinstance(left, LeftInside) or unwrapped(left).marks == () or "### Input:" in text


@pytest.mark.parametrize("part", ["<s>", " ", "<", "[ ", "<|im_start|>system ", "User: Assistant: ", "### "])
def test_a_long_text_takes_no_long_time(part: str) -> None:
    """A search that is quadratic would take hours."""
    assert unwrapped("[INST]" + part * 50_000 + "x").marks


def write(path: Path, lines: list[dict[str, Any]], end: bytes = b"\n") -> Path:
    path.write_bytes(end.join(map(orjson.dumps, lines)))
    return path


def words(name: str, number: int) -> str:
    return " ".join(f"{name}{number}{part}" for part in "abcd")


def section(tmp_path: Path, prompt: str, answer: str, templated: int, strip: bool) -> SeedDataConfig:
    """40 examples, the last of them in these forms, and preferences without a template."""
    examples = [
        {"prompt": prompt.format(text) if n >= 40 - templated else text, "completion": answer.format(f"answer {n}")}
        for n in range(40)
        for text in [words("s", n)]
    ]
    rankings = [{"prompt": words("p", n), "chosen": "a", "rejected": "b"} for n in range(20)]
    return SeedDataConfig(
        source="jsonl", path=write(tmp_path / "sft.jsonl", examples, b"\r\n"), num_validation=3, num_ift=50,
        ranked_path=write(tmp_path / "dpo.jsonl", rankings), num_eft_eval=4, strip_template=strip,
    )  # fmt: skip


def test_a_file_with_a_template_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_jsonl_sets(section(tmp_path, "<s>[INST] {} [/INST]", "{}", 3, False), 0, tmp_path / "bad.jsonl")
    for said in ("3 of the 40 lines of ", "sft.jsonl", "`[INST]`", "in line 38", "seed_data.strip_template=true"):
        assert said in str(error.value)
    with pytest.raises(UserError, match=r"40 of the 40 lines.*`</s>` in line 1,"):
        read_jsonl_sets(section(tmp_path, "{}", "{}</s>", 0, False), 0, tmp_path / "bad.jsonl")


@pytest.mark.parametrize("templated", [1, 2])
def test_few_such_lines_are_text(tmp_path: Path, templated: int) -> None:
    """5 % of 40 lines."""
    sets = read_jsonl_sets(section(tmp_path, "[INST] {} [/INST]", "{}", templated, False), 0, tmp_path / "bad.jsonl")
    assert sets.counts["templated_lines"] == templated


def test_one_line_of_a_small_file_stops_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", [{"text": "[INST] a [/INST]"}, {"text": "b"}])
    assert len(list(read_prompts(path, tmp_path / "bad.jsonl"))) == 2


def test_stripped_texts_hold_no_template(tmp_path: Path) -> None:
    form = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    sets = read_jsonl_sets(section(tmp_path, form, "{}<|im_end|>", 30, True), 0, tmp_path / "bad.jsonl")
    assert sets.counts["templated_lines"] == 40 and sets.counts["templated_rankings"] == 0
    assert all(one.prompt.startswith(("s", "p")) and one.completion.startswith("answer") for one in sets.ift)
    assert not any("<|" in one.prompt + one.completion for one in sets.ift)


def prompts(path: Path, *texts: str, strip: bool) -> tuple[list[str], UserLines[Any]]:
    lines = read_prompts(write(path, [{"text": text} for text in texts]), path.with_name("bad.jsonl"), strip)
    return [prompt.text for prompt in lines], lines


def test_what_is_empty_or_several_turns_without_its_template_is_a_broken_line(tmp_path: Path) -> None:
    good = [f"<s>[INST] {words('p', n)} [/INST]" for n in range(300)]
    texts, lines = prompts(
        tmp_path / "p.jsonl", *good, "<s>[INST] [/INST]", "<s>[INST] a [/INST] b [INST] c [/INST]", strip=True
    )
    assert (len(texts), lines.bad, lines.templated) == (300, 2, 302)
    empty, turns = read_jsonl(tmp_path / "bad.jsonl", BadLine)
    assert (empty.line, empty.reason) == (301, "the field `text` is empty")
    assert turns.line == 302 and "`[/INST]` left inside" in turns.reason and "[INST] c" in turns.content


def test_a_field_that_is_not_read_may_hold_a_template(tmp_path: Path) -> None:
    """As data sets have the rendered text next to the messages."""
    rows = [{"text": words("p", n), "rendered": f"<s>[INST] {n} [/INST] {n} [INST] {n}"} for n in range(9)]
    for strip in (False, True):
        lines = read_prompts(write(tmp_path / "p.jsonl", rows), tmp_path / "bad.jsonl", strip)
        assert len(list(lines)) == 9 and lines.templated == 0


def test_preferences_and_trees_are_looked_at_too(tmp_path: Path) -> None:
    config = section(tmp_path, "{}", "{}", 0, False)
    turn = {"role": "assistant", "content": "a<|eot_id|>"}
    assert config.ranked_path is not None
    write(config.ranked_path, [{"prompt": words("p", n), "chosen": [turn], "rejected": "b"} for n in range(20)])
    with pytest.raises(UserError, match=r"20 of the 20 lines of .*dpo\.jsonl.*`<\|eot_id\|>` in line 1"):
        read_jsonl_sets(config, 0, tmp_path / "bad.jsonl")
    reviewed = {"lang": "en", "review_result": True}
    trees = [
        {
            "message_tree_id": f"t{n}", "tree_state": "ready_for_export",
            "prompt": reviewed | {
                "message_id": f"t{n}", "role": "prompter", "text": f"[INST] {words('t', n)} [/INST]",
                "replies": [
                    reviewed | {"message_id": f"t{n}-{rank}", "parent_id": f"t{n}", "role": "assistant", "rank": rank,
                                "text": f"reply {rank}</s>"}
                    for rank in range(2)
                ],
            },
        }
        for n in range(9)
    ]  # fmt: skip
    oasst = SeedDataConfig(
        source="oasst", path=write(tmp_path / "trees.jsonl", trees), num_eft_eval=2, num_validation=1
    )
    with pytest.raises(UserError, match=r"9 of the 9 lines of .*trees\.jsonl"):
        read_oasst(oasst, 0, tmp_path / "bad.jsonl")
    sets = read_oasst(oasst.model_copy(update={"strip_template": True}), 0, tmp_path / "bad.jsonl")
    assert sets.counts["templated_lines"] == 9
    assert all(one.prompt.startswith("t") and one.completion == "reply 0" for one in sets.ift)


def test_the_template_is_named_before_lines_that_it_breaks(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"text": f"[INST] {n} [/INST]"} for n in range(9)] + [{"other": "x"}])
    lines = UserLines(path, lambda number, fields: text_field(fields, "text"), tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="9 of the 10 lines"):
        list(lines)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("    return x</s>", "    return x"),
        ("<|im_start|>assistant\n    return x<|im_end|>\n", "    return x"),
        ("### Response:\n\n\treturn x", "\treturn x"),
        ("  [/INST] Hello. </s>", "Hello."),
        ("\n<s> Hello.", "Hello."),
    ],
)
def test_code_keeps_its_indentation(text: str, plain: str) -> None:
    assert unwrapped(text).text == plain
