"""A user's data in every form that people have: the same entries, one at a time; what cannot be read is named."""

import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from srlm_mega.checkpoints_conversion import json_files
from srlm_mega.data.prompt_files import read_prompts
from srlm_mega.errors import UserError
from srlm_mega.run import outside_data
from srlm_mega.run.data_folder import data_files
from srlm_mega.run.outside_data import data_hash, data_problem, entries, notes_on

TEXTS = ['Name a bird, "quoted" or [not].', "天空为什么是蓝色的？ \u2028 {", "Add 1\nand 2."]
ROWS = [{"text": text, "system": None, "n": number} for number, text in enumerate(TEXTS)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
PRETTY = "\n".join(json.dumps(row, ensure_ascii=False, indent=2) for row in ROWS)
ARRAY = json.dumps(ROWS, indent=1)


def table() -> pyarrow.Table:
    return pyarrow.Table.from_pylist(ROWS)


def write_stream(file: Path, rows: pyarrow.Table) -> None:
    with pyarrow.ipc.new_stream(str(file), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=2)


def write_saved(folder: Path) -> None:
    """As `Dataset.save_to_disk` does, with the files that `map` and an earlier version leave beside."""
    folder.mkdir(parents=True)
    for number, part in enumerate((table().slice(0, 2), table().slice(2))):
        write_stream(folder / f"data-0000{number}-of-00002.arrow", part)
    write_stream(folder / "cache-1a2b.arrow", table())
    write_stream(folder / "data-00000-of-00001.arrow", table())
    files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    (folder / "dataset_info.json").write_text('{"citation": ""}')


def write_arrow_file(file: Path) -> None:
    with pyarrow.ipc.new_file(str(file), table().schema) as writer:
        writer.write_table(table())


def write_parts(folder: Path) -> None:
    (folder / "more").mkdir(parents=True)
    lines = JSONL.split("\n")
    (folder / "a.jsonl").write_text("\n" + lines[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[1].encode(), mtime=0))
    (folder / "more/c.json").write_text(f"[{lines[2]}]")
    (folder / "README.md").write_text("# Data")
    (folder / ".hidden.jsonl").write_text("{}")


def write_hub(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    for number, part in enumerate((table().slice(0, 1), table().slice(1))):
        pyarrow.parquet.write_table(part, folder / f"data/train-0000{number}-of-00002.parquet")
    pyarrow.parquet.write_table(table(), folder / "data/test-00000-of-00001.parquet")


def write_dict(folder: Path) -> None:
    write_saved(folder / "train")
    write_saved(folder / "train_sft")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "train_sft"]}')


FORMS: dict[str, Callable[[Path], object]] = {
    "lines.jsonl": lambda path: path.write_text(JSONL),
    "lines without a name": lambda path: path.write_text(JSONL),
    "windows.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + JSONL.replace("}\n", "}\r\n").encode()),
    "gzip.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSONL.encode(), mtime=0)),
    "gzip by content.jsonl": lambda path: path.write_bytes(gzip.compress(JSONL.encode(), mtime=0)),
    "utf16.jsonl": lambda path: path.write_bytes(JSONL.encode("utf-16")),
    "utf16 without a mark.jsonl": lambda path: path.write_bytes(JSONL.encode("utf-16-le")),
    "utf16 big end, gzip.json": lambda path: path.write_bytes(gzip.compress(ARRAY.encode("utf-16-be"), mtime=0)),
    "utf32.json": lambda path: path.write_bytes(ARRAY.encode("utf-32")),
    "array.json": lambda path: path.write_text(ARRAY),
    "array in one line.jsonl": lambda path: path.write_text(json.dumps(ROWS)),
    "array without a name": lambda path: path.write_bytes(b"\xef\xbb\xbf \n" + ARRAY.encode()),
    "array.json.gz": lambda path: path.write_bytes(gzip.compress(ARRAY.encode(), mtime=0)),
    "pretty.jsonl": lambda path: path.write_text(PRETTY),
    "table.parquet": lambda path: pyarrow.parquet.write_table(table(), path, row_group_size=2),
    "table.arrow": lambda path: write_stream(path, table()),
    "table.feather": write_arrow_file,
    "parts": write_parts,
    "saved": write_saved,
    "saved dict": write_dict,
    "hub": write_hub,
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_entries_in_every_form(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a value crosses the border of what is read at once."""
    path = tmp_path / name
    FORMS[name](path)
    for buffer in (outside_data.BUFFER, 7):
        monkeypatch.setattr(outside_data, "BUFFER", buffer)
        prompts = list(read_prompts(path, None))
        assert [prompt.text for prompt in prompts] == [text.strip() for text in TEXTS]
        assert len({prompt.id for prompt in prompts}) == len(TEXTS)
    assert data_problem(path) is None
    before = data_hash(path)
    part = data_files(path)[-1]
    part.write_bytes(part.read_bytes()[:-1])
    assert data_hash(path) != before


def test_what_is_not_read_may_come_and_go(tmp_path: Path) -> None:
    """A folder's other files, links to nothing and to itself, and pipes, which would never end."""
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    before = data_hash(tmp_path)
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / "test.jsonl").write_text('{"text": "b"}')
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "again").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert data_hash(tmp_path) == before
    (tmp_path / "train.jsonl").rename(tmp_path / "training.jsonl")
    assert data_hash(tmp_path) != before, "ids are from the file's name"


def test_plain_text_is_a_prompt_per_line(tmp_path: Path) -> None:
    for name, encoding in (("prompts.txt", "utf-8-sig"), ("prompts", "utf-16"), ("prompts.txt.gz", "utf-8")):
        content = "[Poem] Write one.\r\n\n  Name a bird. \n\u5929\u7a7a\uff1f".encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
        prompts = list(read_prompts(tmp_path / name, None))
        assert [prompt.text for prompt in prompts] == ["[Poem] Write one.", "Name a bird.", "天空？"]
        assert [prompt.id for prompt in prompts] == [f"prompts-00000{number}" for number in (1, 3, 4)]
    for text in ("{name} is a field. Why?", "[{name}] is a list. Why?"):
        (tmp_path / "braces.txt").write_text(f"{text}\n{{ Go on\n")
        assert [one.text for one in read_prompts(tmp_path / "braces.txt", None)] == [text, "{ Go on"]
    (tmp_path / "lines.txt").write_text(JSONL)
    assert len(list(read_prompts(tmp_path / "lines.txt", None))) == 3


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"prompt,answer\na,b\n", "a.csv is a table of text: give JSONL"),
        ("a.jsonl", b"PK\x03\x04....", "a zip archive or an Excel file"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd....", "packed by zstd"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        ("a.jsonl", b"<!doctype html><html>", "a web page"),
        ("a.txt", b"<html><body>", "a web page"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "a table that is packed by gzip"),
        ("a.jsonl", "a\u0100".encode("utf-16") + b"\x00", "is UTF-16, and damaged"),
        ("a.parquet", b"PAR1 cut", "a damaged or incomplete table"),
        ("a.arrow", b"\xff\xff\xff\xff cut", "a damaged or incomplete table"),
        ("a.bin", b"text\0\0\0", "is no text"),
        ("a.json", b'[{"text": "a"}, {"text": "b"', "element 2 is broken or cut"),
        ("a.json", b'[{"text": "a"}, {text: "b"}]', "element 2 is broken or cut"),
        ("a.json", b'[{"text": "a"}', "there is no ]"),
        ("a.json", b'[{"text": "a"}] x', "element 2 is broken or cut"),
        ("a.json", b"[" * 100_000, "element 1 is broken or cut"),
        ("a.json", b"", "is empty|holds no records"),
        ("a.json", b"[]", "is empty|holds no records"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        list(read_prompts(tmp_path / name, None))
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match="is no file, and a folder without data files"):
        list(entries(folder))
    (folder / "README.md").touch()
    assert "a folder without data files" in str(data_problem(folder))


def test_an_element_of_an_array_may_be_broken_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    good = ['{"text": "a"}'] * 199
    path.write_bytes(("[" + ",\n".join([*good, '{"text": "\\ud800 \udce9"}']) + "]").encode(errors="surrogateescape"))
    lines = read_prompts(path, tmp_path / "bad.jsonl")
    assert len(list(lines)) == 199 and lines.bad == 1
    bad = json.loads((tmp_path / "bad.jsonl").read_text())
    assert (bad["line"], bad["reason"][:9]) == (200, "not UTF-8")


def test_an_element_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_LINE_BYTES", 1 << 10)
    monkeypatch.setattr(outside_data, "BUFFER", 1 << 8)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 4096}]))
    with pytest.raises(UserError, match="element 1 is broken or cut"):
        list(entries(tmp_path / "a.json"))


def test_a_folder_of_splits_gives_train_and_says_so(tmp_path: Path) -> None:
    write_hub(tmp_path / "hub")
    (note,) = notes_on(tmp_path / "hub")
    assert note == f"{tmp_path}/hub: the split train is read, not test"
    first, second = sorted((tmp_path / "hub/data").glob("train*"))
    first.rename(first.with_name("train_gen-00000-of-00001-a3ecf92756993583.parquet"))
    second.rename(second.with_name("train_prefs-00000-of-00001.parquet"))
    with pytest.raises(UserError, match=r"several splits \(test, train_gen, train_prefs\), and none is `train`"):
        list(entries(tmp_path / "hub"))
    (tmp_path / "gz.jsonl").write_bytes(gzip.compress(JSONL.encode("utf-16"), mtime=0))
    assert list(notes_on(tmp_path / "gz.jsonl")) == [f"{tmp_path}/gz.jsonl is gzip and UTF-16, and is read as such"]


def test_what_is_missing_of_a_folder_is_named(tmp_path: Path) -> None:
    write_hub(tmp_path / "hub")
    (tmp_path / "hub/data/train-00000-of-00002.parquet").unlink()
    assert f"of {tmp_path}/hub/data/train-*-of-00002.parquet only 1 are there" in notes_on(tmp_path / "hub")
    write_saved(tmp_path / "saved")
    (tmp_path / "saved/data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow, which the state.json beside it lists" in str(data_problem(tmp_path / "saved"))


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("b.jsonl.zst", "part-00000", "README.md", ".hidden.csv"):
        (tmp_path / name).write_text("x")
    assert str(data_problem(tmp_path)).endswith(": it has b.jsonl.zst, part-00000")
    (tmp_path / "a.jsonl").write_text(JSONL)
    (note,) = notes_on(tmp_path)
    assert note == f"{tmp_path}: files that are not read, by their names: b.jsonl.zst, part-00000"
    write_saved(tmp_path / "saved")
    assert list(notes_on(tmp_path / "saved")) == []


def test_cells_of_other_types_become_texts_and_numbers(tmp_path: Path) -> None:
    """Texts that older programs wrote as bytes; not text that is in no encoding."""
    cells = {"text": pyarrow.array([b"Hi?", "\u5929".encode()]), "picture": [b"\x89PNG\xff", None]}
    ranks = pyarrow.array([1, 2], pyarrow.int32()).cast(pyarrow.decimal128(12, 1))
    pyarrow.parquet.write_table(pyarrow.table(cells | {"rank": ranks}), tmp_path / "a.parquet")
    read = [json.loads(entry.content) for entry in entries(tmp_path / "a.parquet")]
    assert read == [{"text": "Hi?", "picture": None, "rank": 1.0}, {"text": "天", "picture": None, "rank": 2.0}]
    broken = pyarrow.array([b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet is a damaged"):
        list(entries(tmp_path / "b.parquet"))


def test_damaged_offsets_of_a_table_are_not_followed(tmp_path: Path) -> None:
    """They would end the process."""
    write_stream(tmp_path / "a.arrow", pyarrow.table({"text": ["x" * 1234, "y" * 1111]}))
    content = (tmp_path / "a.arrow").read_bytes()
    assert content.count(struct.pack("<3i", 0, 1234, 2345)) == 1
    damaged = content.replace(struct.pack("<3i", 0, 1234, 2345), struct.pack("<3i", 0, 1 << 30, 2345))
    (tmp_path / "a.arrow").write_bytes(damaged)
    assert "a.arrow is a damaged or incomplete table" in str(data_problem(tmp_path / "a.arrow"))


def test_a_broken_line_of_a_folder_is_named_with_its_file(tmp_path: Path) -> None:
    write_parts(tmp_path / "parts")
    (tmp_path / "parts/b.jsonl").write_text('{"text": "b"}\n{"name": "c"}\n')
    with pytest.raises(UserError, match=r"line 2 of b\.jsonl: not a prompt"):
        list(read_prompts(tmp_path / "parts", None))


def test_tables_need_a_package_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow.parquet.write_table(table(), tmp_path / "a.parquet")
    monkeypatch.setattr(outside_data, "find_spec", lambda name: None)
    assert "pip install 'srlm-mega[tables]'" in str(data_problem(tmp_path / "a.parquet"))
