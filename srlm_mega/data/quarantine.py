"""Reader of a user's data. Broken entries are named and set aside; too many of them stop the run, and so do too many
texts that hold a chat template already."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import orjson

from srlm_mega.data.template_marks import LeftInside, speakers_apart, unwrap_all
from srlm_mega.errors import UserError
from srlm_mega.run.outside_data import UserEntry, entries, notes_on

T = TypeVar("T")

MAX_BAD_FRACTION = 0.01
MAX_TEMPLATED_FRACTION = 0.05
LINES_NAMED = 5


class LeftOut(ValueError):
    """A line that is sound, and says nothing that is of use: it is counted, and no mistake."""


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used. `line` counts the lines, elements or rows of the file from 1; `content` is the line,
    bytes that are not UTF-8 as \\xNN."""

    file: str
    line: int
    reason: str
    content: str


class UserLines(Generic[T]):
    """Iterable over the entries of a user's data (`run/outside_data.py`), each parsed by `parse(number, fields)`, which
    raises ValueError for one that it cannot use, LeftOut for one of no use. Fields that are null are left out.

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
        self._named: list[str] = []
        self._first_templated = ""
        self.good = 0
        self.bad = 0
        self.left_out = 0
        self.templated = 0

    def __iter__(self) -> Iterator[T]:
        for note in notes_on(self._path):
            print(note)
        reason = ""
        with ExitStack() as open_files:
            set_aside: BinaryIO | None = None
            for entry in entries(self._path):
                try:
                    record = self._record(entry)
                except LeftOut as error:
                    self.left_out += 1
                    reason = reason or f"; {where(entry, self._path)}, for one, is left out: {error}"
                except ValueError as error:
                    content = entry.content.decode("utf-8", errors="backslashreplace")
                    bad = BadLine(str(entry.file), entry.number, str(error), content)
                    if self._quarantine is not None:
                        set_aside = set_aside or open_files.enter_context(self._quarantine.open("wb"))
                        set_aside.write(orjson.dumps(bad, option=orjson.OPT_APPEND_NEWLINE))
                    self.bad += 1
                    self._named += [f"{where(entry, self._path)}: {error}"] if self.bad <= LINES_NAMED else []
                else:
                    self.good += 1
                    yield record
        total = self.good + self.bad + self.left_out
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
            first = f"the first is {self._named[0]}"
            print(f"{self.bad} of the {total} lines of {self._path} cannot be used: {self._quarantine.name}; {first}")
        if not self.good:
            if self.left_out:
                raise UserError(f"none of the {total} lines of {self._path} is of use{reason}")
            raise UserError(f"{self._path} holds no records: it needs one JSON object per line")

    def _record(self, entry: UserEntry) -> T:
        """Parse an entry, and count it when the texts that are read from it begin or end with a template's marks."""
        number, fields = entry.place, speakers_apart(json_object(entry.content))
        marks = unwrap_all(fields)
        plain = self._outcome(number, fields)
        given = self._outcome(number, speakers_apart(json_object(entry.content))) if marks else plain
        if marks and repr(given) != repr(plain):  # marks in a field that is not read change nothing
            self.templated += 1
            named = ", ".join(f"`{mark}`" for mark in marks)
            self._first_templated = self._first_templated or f"{named} in {where(entry, self._path)}"
        record = plain if self._strip_template else given
        if isinstance(record, ValueError):
            raise record
        return record

    def _outcome(self, number: int, fields: dict[str, Any]) -> T | ValueError:
        try:
            return self._parse(number, fields)
        except ValueError as error:
            return error


def where(entry: UserEntry, path: Path) -> str:
    """Return the place of an entry in words; the file is named where the path is a folder."""
    return f"{entry.unit} {entry.number}" + (f" of {entry.file.relative_to(path)}" if entry.file != path else "")


def text_field(fields: dict[str, Any], name: str, leading_blanks: bool = False) -> str:
    """Return a field's text without white space at its end and, unless `leading_blanks`, at its beginning. Raise
    ValueError when it is missing, empty or no text."""
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
    return value.rstrip() if leading_blanks else value.strip()


def optional_text(fields: dict[str, Any], name: str) -> str:
    """Return a field's text without surrounding white space, empty when it is missing, null or empty."""
    value = fields.get(name)
    is_empty = value is None or (isinstance(value, str) and not value.strip())
    return "" if is_empty else text_field(fields, name)


def json_object(line: bytes) -> dict[str, Any]:
    """Parse a line as a JSON object, without its fields that are null. Raise ValueError when it is anything else."""
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
    return without_null(value)


def without_null(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are not null: tables have every column in every row."""
    return {name: one for name, one in fields.items() if one is not None}


def too_many(path: Path, first: list[str], bad: int, total: int) -> str:
    """Return the message about a file with too many bad lines; the `first` ones are named."""
    named = "; ".join(first)
    more = f"; and {bad - len(first)} more" if bad > len(first) else ""
    small = f" (of {total} lines even a single one is more than that)" if total * MAX_BAD_FRACTION < 1 else ""
    return (
        f"{bad} of the {total} lines of {path} cannot be used, more than the "
        f"{MAX_BAD_FRACTION:.0%} that srlm sets aside{small}: {named}{more}. "
        "Fix or delete these lines and start again"
    )
