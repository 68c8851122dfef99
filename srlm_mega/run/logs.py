"""A run's logs, as watchers read them. They are not hashed: what a kill, a full disk or a person damaged is left
out."""

from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
LARGEST = 3.5e38  # of 32 bits, in which training computes


def read_state(path: Path, kind: type[T]) -> T | None:
    """Return what a small JSON file says, None where it cannot be read as such."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def read_metrics(path: Path, last_bytes: int | None = None) -> list[dict[str, float | None]]:
    """Read the numbers in the whole lines of a metrics.jsonl, or in the newest ones; NaN and inf are None. A file that
    is not there has none, and one that grows may end with half a line."""
    try:
        with path.open("rb") as file:
            start = 0 if last_bytes is None else max(0, file.seek(0, 2) - last_bytes)
            file.seek(start)
            lines = file.read().split(b"\n")
    except OSError:
        return []
    return [row for line in lines[1 if start else 0 : -1] if (row := numbers(line))]


def numbers(line: bytes) -> dict[str, float | None]:
    """Return the numbers of a JSON object by their keys; nothing for a line that is none."""
    try:
        row: Any = orjson.loads(line)
    except orjson.JSONDecodeError:
        return {}
    return {key: value for key, value in row.items() if is_number(value)} if isinstance(row, dict) else {}


def is_number(value: object) -> bool:
    """Tell whether a value of a metrics.jsonl is a number that training can compute, or None."""
    if isinstance(value, int | float):
        return not isinstance(value, bool) and abs(value) <= LARGEST
    return value is None
