"""JSON from outside: objects and lines of bounded size, each key once."""

import json
import re
from collections.abc import Iterator
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO

import orjson

MAX_OBJECT_BYTES = 32 * 1024**2  # those of the largest models have 10 MB; in memory it becomes up to 25 times as much
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
MAX_LINE_BYTES = 16 * 1024**2  # of JSONL: far more than any context is long


def parse_object(content: bytes, where: Path | str) -> dict[str, Any]:
    """Return the JSON object that a file's bytes are. ValueError, with the file, for anything else, for more than 32
    MiB, and for a key that is given twice: readers differ in which of the two they take."""
    if len(content) > MAX_OBJECT_BYTES:
        raise ValueError(f"{where} is larger than {MAX_OBJECT_BYTES >> 20} MiB, as no such file is: download it again")
    try:
        found = json.loads(
            content.decode(),
            object_pairs_hook=_each_once,
            parse_int=orjson.loads,  # it takes no NaN, and no number that is more than a float
            parse_float=orjson.loads,
            parse_constant=orjson.loads,
        )
        if SURROGATE.search(content) is not None:
            orjson.loads(content)  # nor half a character
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}): download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds {type(found).__name__}, not an object: download it again")
    return found


def bounded_lines(file: BinaryIO | BufferedIOBase, where: Path) -> Iterator[bytes]:
    """Yield the lines of an open file. ValueError, with file and line, for one longer than 16 MiB."""
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), start=1):
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(
                f"{where}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB, and is not read: give one "
                "JSON object per line"
            )
        yield line


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return found
