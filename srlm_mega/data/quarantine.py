"""Reader of a user's JSONL. Broken lines are named and set aside; too many of them stop the run, and so do too many
texts that hold a chat template already."""

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import orjson

from srlm_mega.data.template_marks import LeftInside, unwrap_all
from srlm_mega.errors import UserError
from srlm_mega.records import lines_of

T = TypeVar("T")

MAX_BAD_FRACTION = 0.01
MAX_TEMPLATED_FRACTION = 0.05
LINES_NAMED = 5


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used. `line` counts from 1; `content` is the line, bytes that are not UTF-8 as \\xNN."""

    file: str
    line: int
    reason: str
    content: str


class UserLines(Generic[T]):
    """Iterable over the lines of a `.jsonl` or `.jsonl.gz`, each parsed by `parse(line number, fields)`, which raises
    ValueError for a line it cannot use. Blank lines are skipped.

    Bad lines are written to the JSONL `quarantine`, unless it is None; without any, no file is made. `strip_template`
    takes the marks of chat templates off the texts. Iteration raises UserError when the file cannot be read, and at its
    end when more than 1 % of the lines are bad or none is good, or when more than 5 % hold a template that is not taken
    off.
    """

    def __init__(
        self,
        path: Path,
        parse: Callable[[int, dict[str, Any]], T],
        quarantine: Path | None,
        strip_template: bool = False,
    ) -> None:
        self._path = path
        self._parse = parse
        self._quarantine = quarantine
        self._strip_template = strip_template
        self._named: list[BadLine] = []
        self._first_templated = ""
        self.good = 0
        self.bad = 0
        self.templated = 0

    def __iter__(self) -> Iterator[T]:
        with ExitStack() as open_files:
            set_aside: BinaryIO | None = None
            for number, line in numbered_lines(self._path):
                try:
                    record = self._record(number, line)
                except ValueError as error:
                    content = line.decode("utf-8", errors="backslashreplace")
                    bad = BadLine(str(self._path), number, str(error), content)
                    if self._quarantine is not None:
                        set_aside = set_aside or open_files.enter_context(self._quarantine.open("wb"))
                        set_aside.write(orjson.dumps(bad, option=orjson.OPT_APPEND_NEWLINE))
                    self.bad += 1
                    self._named += [bad] if self.bad <= LINES_NAMED else []
                else:
                    self.good += 1
                    yield record
        total = self.good + self.bad
        if not self._strip_template and self.templated > max(1, MAX_TEMPLATED_FRACTION * total):
            raise UserError(
                f"{self.templated} of the {total} lines of {self._path} begin or end with marks of a chat template: "
                f"{self._first_templated}, for one. srlm writes every text into the model's own template, which would "
                "be a second one. Set seed_data.strip_template=true to take the marks off, or give the plain texts"
            )
        if self.bad > MAX_BAD_FRACTION * total:
            listed = "" if self._quarantine is None else f". All of them are in {self._quarantine}"
            raise UserError(too_many(self._path, self._named, self.bad, total) + listed)
        if self.bad and self._quarantine is not None:
            first = f"the first is line {self._named[0].line}"
            print(f"{self.bad} of the {total} lines of {self._path} cannot be used: {self._quarantine.name}; {first}")
        if not self.good:
            raise UserError(f"{self._path} holds no records: it needs one JSON object per line")

    def _record(self, number: int, line: bytes) -> T:
        """Parse a line, and count it when the texts that are read from it begin or end with a template's marks."""
        fields = json_object(line)
        marks = unwrap_all(fields)
        plain = self._outcome(number, fields)
        given = self._outcome(number, json_object(line)) if marks else plain
        if marks and repr(given) != repr(plain):  # marks in a field that is not read change nothing
            self.templated += 1
            named = ", ".join(f"`{mark}`" for mark in marks)
            self._first_templated = self._first_templated or f"{named} in line {number}"
        record = plain if self._strip_template else given
        if isinstance(record, ValueError):
            raise record
        return record

    def _outcome(self, number: int, fields: dict[str, Any]) -> T | ValueError:
        try:
            return self._parse(number, fields)
        except ValueError as error:
            return error


def text_field(fields: dict[str, Any], name: str) -> str:
    """Return a field's text without surrounding white space. Raise ValueError when it is missing, empty or no text."""
    if name not in fields:
        raise ValueError(f"the field `{name}` is missing")
    value = fields[name]
    if isinstance(value, LeftInside):
        raise ValueError(
            f"the field `{name}` has a template's mark `{value.mark}` left inside, as if it were several turns: give "
            "each turn a text of its own (`messages`)"
        )
    if not isinstance(value, str):
        raise ValueError(f"the field `{name}` is {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"the field `{name}` is empty")
    return value.strip()


def optional_text(fields: dict[str, Any], name: str) -> str:
    """Return a field's text without surrounding white space, empty when it is missing, null or empty."""
    value = fields.get(name)
    is_empty = value is None or (isinstance(value, str) and not value.strip())
    return "" if is_empty else text_field(fields, name)


def json_object(line: bytes) -> dict[str, Any]:
    """Parse a line as a JSON object. Raise ValueError when it is anything else."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} is 0x{line[error.start]:02x}") from None
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return value


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the non-blank lines of a plain or gzipped file with their numbers (from 1), without line breaks. Raise
    UserError when there is no such file, or its gzip stream is damaged."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(lines_of(file, path), start=1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if content.strip():
                    yield number, content.rstrip(b"\r\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged or incomplete gzip file ({error}): download it again") from None


def too_many(path: Path, first: list[BadLine], bad: int, total: int) -> str:
    """Return the message about a file with too many bad lines; the `first` ones are named."""
    named = "; ".join(f"line {line.line}: {line.reason}" for line in first)
    more = f"; and {bad - len(first)} more" if bad > len(first) else ""
    small = f" (of {total} lines even a single one is more than that)" if total * MAX_BAD_FRACTION < 1 else ""
    return (
        f"{bad} of the {total} lines of {path} cannot be used, more than the "
        f"{MAX_BAD_FRACTION:.0%} that srlm sets aside{small}: {named}{more}. "
        "Fix or delete these lines and start again"
    )
