"""A user's JSONL: broken lines are named and set aside, too many stop the run, hostile content changes nothing."""

import gzip
from pathlib import Path
from typing import Any

import orjson
import pytest

from srlm_mega.checkpoints_conversion import json_files
from srlm_mega.data.quarantine import BadLine, UserLines, text_field
from srlm_mega.errors import UserError
from srlm_mega.records import FailedRequest, read_jsonl


def read(path: Path, *lines: bytes) -> tuple[list[str], int]:
    """The records of the good lines, and the number of bad ones."""
    path.write_bytes(b"\n".join(lines) + b"\n")
    parsed = UserLines(path, lambda number, fields: text_field(fields, "text"), path.with_suffix(".bad"))
    return list(parsed), parsed.bad


def good(count: int) -> list[bytes]:
    return [orjson.dumps({"text": f"line {number}"}) for number in range(count)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON"),
        (b"hello", "not JSON"),
        (b'["text"]', "a JSON list"),
        (b'{"text": "caf\xe9"}', "not UTF-8: byte 13 is 0xe9"),
        (b'{"other": "x"}', "`text` is missing"),
        (b'{"text": 3}', "`text` is int"),
        (b'{"text": "  "}', "`text` is empty"),
        (b'{"text": "\\ud800"}', "not JSON"),
        (b'{"text": NaN}', "not JSON"),
    ],
)
def test_a_broken_line_is_named_and_set_aside(
    tmp_path: Path, line: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "seed.jsonl"
    records, number_bad = read(path, *good(150), line, *good(49))
    assert len(records) == 199
    assert "1 of the 200 lines" in (said := capsys.readouterr().out) and "seed.bad" in said and "line 151" in said
    (bad,) = read_jsonl(path.with_suffix(".bad"), BadLine)
    assert number_bad == 1
    assert (bad.file, bad.line) == (str(path), 151)
    assert reason in bad.reason
    assert bad.content == line.decode("utf-8", errors="backslashreplace")


def test_more_than_one_percent_stop_the_run(tmp_path: Path) -> None:
    path = tmp_path / "seed.jsonl"
    assert read(path, *good(99), b"x")[1] == 1, "exactly 1 % is accepted"
    with pytest.raises(UserError) as error:
        read(path, *good(98), *[b"x"] * 7)
    message = str(error.value)
    assert "7 of the 105 lines" in message and "line 99: not JSON" in message and "and 2 more" in message
    assert "Fix or delete" in message and "even a single one" not in message
    assert str(path.with_suffix(".bad")) in message
    assert len(list(read_jsonl(path.with_suffix(".bad"), BadLine))) == 7


def test_in_a_small_file_one_bad_line_is_too_many_and_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of 60 lines even a single one is more than that"):
        read(tmp_path / "seed.jsonl", *good(59), b"x")


def test_a_good_file_leaves_no_quarantine(tmp_path: Path) -> None:
    path = tmp_path / "seed.jsonl"
    assert read(path, *good(2))[1] == 0
    assert not path.with_suffix(".bad").exists()


def test_blank_lines_line_ends_and_a_byte_order_mark_are_no_mistake(tmp_path: Path) -> None:
    records, _ = read(tmp_path / "seed.jsonl", b'\xef\xbb\xbf{"text": "a"}\r', b"", b"  ", b'{"text": "b"}')
    assert records == ["a", "b"]


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 3: "):
        read(tmp_path / "seed.jsonl", b"", b'{"text": "a"}', b"x")


def test_gzip_is_read_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    def parse(number: int, fields: dict[str, Any]) -> str:
        return text_field(fields, "text")

    path = tmp_path / "seed.jsonl.gz"
    content = gzip.compress(b"\n".join(good(500)))
    path.write_bytes(content)
    assert len(list(UserLines(path, parse, tmp_path / "bad"))) == 500
    for broken in (content[:-20], b"plain text", content[:100] + b"\0" * 50):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="gzip"):
            list(UserLines(path, parse, tmp_path / "bad"))


def test_an_empty_or_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no records"):
        read(tmp_path / "seed.jsonl")
    with pytest.raises(UserError, match="there is no file"):
        list(UserLines(tmp_path / "absent", lambda number, fields: number, tmp_path / "bad"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "own.jsonl"])
def test_a_line_without_end_is_named_and_not_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every reader of lines: of a user's files, packed or not, and of a run's own."""
    monkeypatch.setattr(json_files, "MAX_LINE_BYTES", 1 << 20)
    message = FailedRequest("a", "x", 1)
    content = orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE) + b'{"id": "' + b"x" * (2 << 20) + b'"}\n'
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    users = UserLines(path, lambda number, fields: text_field(fields, "id"), tmp_path / "bad")
    with pytest.raises(UserError, match=rf"{name}:2: the line is longer than 1 MiB") as error:
        list(read_jsonl(path, FailedRequest) if name == "own.jsonl" else users)
    assert "xxx" not in str(error.value)
