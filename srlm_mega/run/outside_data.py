"""A user's data from outside: the entries of its files one by one, in the forms that people have.

JSON lines, a JSON array, objects printed over several lines, plain text, Parquet, Arrow and Hugging Face's folders of
them; gzip; UTF-8 and UTF-16. The bytes say what a file is, whatever its name.
"""

import codecs
import gzip
import json
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import BufferedIOBase, TextIOWrapper
from pathlib import Path
from typing import BinaryIO, Literal, assert_never

import orjson

from srlm_mega.checkpoints_conversion import json_files
from srlm_mega.checkpoints_conversion.model_place import POINTER
from srlm_mega.errors import UserError
from srlm_mega.run.data_folder import JSON_NAMES, TRAIN, data_files, plain_suffix, splits_in, unread_files
from srlm_mega.run.manifest import digest_of, entry_of, file_hash

BUFFER = 1024**2  # bytes, or characters, that are read at once
HEAD = 4096  # bytes that show what a file is
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
# Other beginnings of files, what they are and what to do.
REFUSED = {
    b"PK\x03\x04": "a zip archive or an Excel file: unpack it, or save it as JSONL",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it (zstd -d)",
    b"BZh": "packed by bzip2: unpack it (bunzip2)",
    b"\xfd7zXZ": "packed by xz: unpack it (unxz)",
    POINTER: "a pointer of Git LFS in place of the data: fetch them (git lfs pull)",
    b"<!DOCTYPE": "a web page: download the file itself",
    b"<!doctype": "a web page: download the file itself",
    b"<html": "a web page: download the file itself",
}
ENCODINGS = {  # by the byte order mark
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
SHARD = re.compile(r"-\d{5}(-of-\d{5})")
BETWEEN = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True)
class UserEntry:
    """One entry of a user's data. `number` counts the entries of its `file` (its lines, elements or rows, as `unit`
    says) from 1, and `place` counts on from file to file. `content` is the JSON of an object, where it is sound."""

    file: Path
    unit: str
    number: int
    place: int
    content: bytes


@dataclass(frozen=True)
class Form:
    """What a file is: JSON lines, JSON values one after another (an array, or objects over several lines), plain text,
    or a table's rows; packed by gzip or not; and its encoding."""

    kind: Literal["lines", "values", "text", "rows"]
    packed: bool = False
    encoding: str = "UTF-8"

    @property
    def unit(self) -> str:
        """What an entry is called."""
        return {"lines": "line", "values": "element", "text": "line", "rows": "row"}[self.kind]


def entries(path: Path) -> Iterator[UserEntry]:
    """Yield the entries of a file, or of a folder's files in the order of their names. Blank lines are none. UserError
    when there is no such file, when it is damaged, or in no form that can be read."""
    before = 0
    for file in data_files(path):
        form, number = form_of(file), 0
        for number, content in numbered(file, form):
            yield UserEntry(file, form.unit, number, before + number, content)
        before += number


def data_problem(path: Path) -> str | None:
    """Return why nothing can be read at a path, None when its first entry can be."""
    try:
        size = sum(file.stat().st_size for file in data_files(path))
        return None if any(True for _ in entries(path)) else f"{path} is empty ({size} bytes)"
    except (UserError, OSError) as error:
        return str(error)


def data_hash(path: Path) -> str:
    """Return a hash of the files that are read at a path: whatever else a folder has may come and go. UserError as for
    `data_files`."""
    if path.is_file():
        return file_hash(path)
    return digest_of({str(file.relative_to(path)): entry_of(file) for file in data_files(path)})


def notes_on(path: Path) -> Iterator[str]:
    """Yield what is worth saying about how a path is read: the split that is taken, files that are not read, shards
    that are not all there, and files that are not as their names say."""
    splits = splits_in(path) if path.is_dir() else {}
    if len(splits) > 1:
        others = ", ".join(sorted(name or "files of no split" for name in splits.keys() - {TRAIN}))
        yield f"{path}: the split train is read, not {others}"
    unread = unread_files(path, {file for files in splits.values() for file in files})
    if unread and splits:
        yield f"{path}: files that are not read, by their names: {unread}"
    files = data_files(path)
    shards = Counter(file.with_name(SHARD.sub(r"-*\1", file.name)) for file in files if file != path)
    for pattern, number in shards.items():
        total = pattern.name.partition("-*-of-")[2][:5]
        if total and number != int(total):
            yield f"of {pattern} only {number} are there"
    for file in files:
        form = form_of(file)
        said = ["gzip"] * (form.packed and file.suffix != ".gz") + [form.encoding] * (form.encoding != "UTF-8")
        if said:
            yield f"{file} is {' and '.join(said)}, and is read as such"


def form_of(file: Path) -> Form:
    """Return the form of a file by its first bytes. UserError for one that cannot be read."""
    with file.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b" or file.suffix == ".gz"
    with unpacked(file, packed) as content:
        head = content.read(HEAD)
    refused = next((what for start, what in REFUSED.items() if head.startswith(start)), None)
    if refused is not None:
        raise UserError(f"{file} is {refused}")
    if head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        if packed:
            raise UserError(f"{file} is a table that is packed by gzip: unpack it (gunzip)")
        if find_spec("pyarrow") is None:
            raise UserError(f"{file} is Parquet or Arrow, for which pyarrow is needed: pip install 'srlm-mega[tables]'")
        return Form("rows")
    encoding = next((name for mark, name in ENCODINGS.items() if head.startswith(mark)), "UTF-8")
    if encoding == "UTF-8" and b"\0" in head[:2]:
        encoding = "UTF-16-BE" if head[:1] == b"\0" else "UTF-16-LE"
    start, suffix = head.decode(encoding, "replace").lstrip("\ufeff \t\r\n"), plain_suffix(file)
    is_named = suffix in JSON_NAMES  # else a text may begin with a bracket, too
    is_object = re.match(r"\{" if is_named else r"\{\s*[\"'}]", start) is not None
    is_printed = is_object and start.partition("\n")[0].strip() == "{"
    if is_printed or re.match(r"\[" if is_named else r"\[\s*(\{\s*[\"'}]|\{?\s*\Z)", start):
        return Form("values", packed, encoding)
    if is_object or is_named or not start:
        return Form("lines", packed, encoding)
    if "\0" in start or suffix in (".csv", ".tsv"):
        what = "a table of text" if suffix in (".csv", ".tsv") else "no text"
        raise UserError(f"{file} is {what}: give JSONL (one JSON object per line), a JSON array or Parquet")
    return Form("text", packed, encoding)


def numbered(file: Path, form: Form) -> Iterator[tuple[int, bytes]]:
    """Yield the entries of a file in this form with their numbers, from 1."""
    if form.kind == "rows":
        from srlm_mega.run.arrow_rows import as_json, rows  # it loads pyarrow, which nothing else here needs

        yield from enumerate((orjson.dumps(row, default=as_json) for row in rows(file)), start=1)
        return
    with unpacked(file, form.packed) as packed, in_utf8(file, packed, form.encoding) as content:
        match form.kind:
            case "values":
                yield from enumerate(json_values(content, file), start=1)
            case "lines" | "text":
                try:
                    for number, line in enumerate(json_files.bounded_lines(content, file), start=1):
                        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                        if line.strip():
                            yield number, line.rstrip(b"\r\n") if form.kind == "lines" else as_text(line)
                except ValueError as error:  # checkpoints_conversion does not import UserError
                    raise UserError(str(error)) from None
            case _:
                assert_never(form.kind)


def as_text(line: bytes) -> bytes:
    """Return a line of plain text as JSON; as it is, which is none, where it is not UTF-8."""
    try:
        return orjson.dumps({"text": line.decode().strip()})
    except UnicodeDecodeError:
        return line


@contextmanager
def unpacked(file: Path, packed: bool) -> Iterator[BinaryIO | BufferedIOBase]:
    """Open a file, unpacked. UserError when its gzip stream is damaged."""
    try:
        with gzip.open(file) if packed else file.open("rb", BUFFER) as content:
            yield content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: its gzip is damaged or cut ({error}). Download it again") from None


@contextmanager
def in_utf8(file: Path, content: BinaryIO | BufferedIOBase, encoding: str) -> Iterator[BinaryIO | BufferedIOBase]:
    """Yield content in UTF-8: itself, or a temporary copy. UserError when it is not in its encoding."""
    if encoding == "UTF-8":
        yield content
        return
    with ExitStack() as open_files:
        copy = open_files.enter_context(tempfile.TemporaryFile())
        try:
            text = TextIOWrapper(content, encoding, newline="")  # type: ignore[type-var]  # any buffer will do
            for part in iter(partial(text.read, BUFFER), ""):
                copy.write(part.encode())
        except UnicodeError as error:
            raise UserError(f"{file} is {encoding}, and damaged ({error}): save it as UTF-8") from None
        copy.seek(0)
        yield copy


def json_values(content: BinaryIO | BufferedIOBase, file: Path) -> Iterator[bytes]:
    """Yield the JSON values of an array, or those that follow one another, each as it is written; one is in memory at a
    time. UserError for one that is broken, cut or longer than 16 MiB, since the next one cannot be found."""
    text = TextIOWrapper(content, "utf-8-sig", errors="surrogateescape")  # type: ignore[type-var]
    decoder, buffer, position, number = json.JSONDecoder(), text.read(BUFFER).lstrip(), 0, 0
    is_array = buffer.startswith("[")
    position = int(is_array)
    while True:
        found = BETWEEN.match(buffer, position)
        assert found is not None, "it matches no character too"
        position = found.end()
        if is_array and buffer.startswith("]", position):
            is_array, position = False, position + 1
            continue
        try:
            _, end = decoder.raw_decode(buffer, position)
        except (ValueError, RecursionError) as error:
            more = text.read(BUFFER) if len(buffer) - position <= json_files.MAX_LINE_BYTES else ""
            buffer, position = buffer[position:] + more, 0
            if more:
                continue
            if not buffer and not is_array:
                return
            wrong = "it is cut: there is no ]" if not buffer else f"element {number + 1} is broken or cut ({error})"
            raise UserError(
                f"{file} is neither a JSON list nor JSON lines to its end: {wrong}. Write it again"
            ) from None
        yield buffer[position:end].encode(errors="surrogateescape")
        position, number = end, number + 1
