"""Manifest and identity of an output, and the hashes of its files."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import xxhash

from srlm_mega.run.logs import read_state

MANIFEST = "manifest.json"
IDENTITY = "identity.json"
TRACKING_ID = "tracking_id"
# Logs hold times, so they differ between two runs of the same thing: named in a manifest, never hashed.
LOG_NAMES = frozenset({"metrics.jsonl", "tensorboard", TRACKING_ID})  # files, and folders with all that they hold
# `srlm run` re-hashes files up to this size at every start and checks the size of larger ones, which are hashed before
# a stage reads them.
QUICK_HASH_BYTES = 256 * 2**20
HASH_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class FileEntry:
    """One file of an output: size in bytes and xxh3-128 of its content."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Identity:
    """Configuration and inputs that decide an output. `layout` is where and how it is made: recorded, not compared."""

    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    layout: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compared(self) -> bytes:
        """Content of a partial output's identity.json: it is resumed only if it was begun with the same."""
        return orjson.dumps([self.stage, self.config, self.inputs], option=orjson.OPT_SORT_KEYS)


@dataclass(frozen=True)
class Manifest:
    """The last file of an output. `rows` counts the records of its main file (0 where there are none), `seconds` are
    those of the attempt that finished it, and `layout` is that attempt's. `seal` is the hash of all the others; an
    older version wrote none."""

    stage: str
    digest: str
    files: Mapping[str, FileEntry]
    inputs: Mapping[str, str]
    config: Mapping[str, Any]
    rows: int
    seconds: float
    version: str
    logs: tuple[str, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)
    seal: str = ""

    def sealed(self) -> "Manifest":
        """Return the manifest with its seal."""
        content = orjson.dumps(replace(self, seal=""), option=orjson.OPT_SORT_KEYS)
        return replace(self, seal=xxhash.xxh3_128_hexdigest(content))


def begun_with(path: Path) -> Identity | None:
    """Read an identity.json; return None where there is none that can be read."""
    found = read_state(path, tuple[str, dict[str, Any], dict[str, str]])
    return None if found is None else Identity(*found)


def log_name(name: str) -> str | None:
    """Return the log that this file of an output is, or is in; None when it is none."""
    parts = name.split("/")
    return next(("/".join(parts[: place + 1]) for place, part in enumerate(parts) if part in LOG_NAMES), None)


def damage(path: Path, entry: FileEntry, list_name: str, list_says: str, quick: bool = False) -> str | None:
    """Return how a file differs from its entry in a list of files, None when it does not; `quick` skips the hash of
    files above 256 MiB. Messages call the list `list_name` for a missing file and `list_says` for another content."""
    if not path.is_file():
        return f"{path} is missing, but {list_name} lists it"
    size = path.stat().st_size
    if size != entry.bytes:
        return f"{path} has {size} bytes, {list_says} says {entry.bytes}"
    if quick and size > QUICK_HASH_BYTES:
        return None
    got = file_hash(path)
    if got != entry.xxh3_128:
        return f"{path} was altered: its xxh3-128 is {got}, {list_says} says {entry.xxh3_128}"
    return None


def entry_of(path: Path) -> FileEntry:
    """Return a file's size and hash."""
    return FileEntry(path.stat().st_size, file_hash(path))


def file_hash(path: Path) -> str:
    """Return the xxh3-128 of a file's content, in hexadecimal."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def digest_of(files: Mapping[str, FileEntry]) -> str:
    """Return one hash for a set of named files."""
    return xxhash.xxh3_128_hexdigest("".join(f"{name}\0{files[name].xxh3_128}\n" for name in sorted(files)).encode())
