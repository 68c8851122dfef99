"""Files by which a killed attempt is resumed, each with a hidden seal beside it: the hash of its content, and of what
it was made from. One that was cut, emptied or edited, or is another's, is found before it is used."""

from collections.abc import Callable, Iterable
from pathlib import Path

import orjson
import xxhash

from srlm_mega.run.files import write_atomic, write_durably
from srlm_mega.run.manifest import file_hash

SEAL = ".seal"


def fingerprint(*parts: object, of: Iterable[object] = ()) -> str:
    """Return one hash for values, records, and any number of further ones."""
    state = xxhash.xxh3_128()
    for part in (*parts, *of):
        state.update(orjson.dumps(part, default=str, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE))
    return state.hexdigest()


def contents(*paths: Path) -> str:
    """Return one hash for the contents of files, of which some may not be there."""
    return fingerprint(*(file_hash(path) if path.is_file() else None for path in paths))


def write_sealed(path: Path, write: Callable[[Path], object], made_from: str = "") -> None:
    """Write a file as `write_durably` does, and before it has its name its seal."""

    def write_both(temporary: Path) -> None:
        write(temporary)
        write_atomic(seal_of(path), f"{file_hash(temporary)} {made_from}".encode())

    write_durably(path, write_both)


def is_whole(path: Path, made_from: str | None = None, unsealed: bool = False) -> bool:
    """Tell whether a file is there as it was written, and, where that is given, from the same. Any other is named: it
    is to be made again. With `unsealed`, one that has no seal, as an older version wrote it, is taken."""
    whole = has_its_seal(path, made_from, unsealed)
    if path.is_file() and not whole:
        print(f"{path} is not as it was written, or not for these requests: it is made again", flush=True)
    return whole


def has_its_seal(path: Path, made_from: str | None = None, unsealed: bool = False) -> bool:
    """Tell what `is_whole` does, and print nothing."""
    if not path.is_file() or not seal_of(path).is_file():
        return path.is_file() and unsealed
    content, _, source = seal_of(path).read_bytes().partition(b" ")
    return content == file_hash(path).encode() and made_from in (None, source.decode(errors="replace"))


def seal_of(path: Path) -> Path:
    """Return the path of a file's seal."""
    return path.with_name(f".{path.name}{SEAL}")
