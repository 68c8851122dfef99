"""Files of torch.save and pickles of torch's classes, written without torch: its import takes as long as copying a
small model."""

import io
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DATA = "archive/data/0"  # a tensor's numbers in the archive
ZEROS = bytes(1 << 20)


@dataclass(frozen=True, eq=False)
class Global:
    """A class, function or constant of a library, which a pickle holds by its name."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class Call:
    """What a function or a class of a library makes of these arguments where the pickle is read."""

    function: Global
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Storage:
    """A reference to numbers outside of the pickle, by torch's key."""

    key: tuple[Any, ...]


def pickled(value: object) -> bytes:
    """Return the pickle, of the protocol that torch.load takes, of plain values, `Global`, `Call` and `Storage`."""
    return b"".join((pickle.PROTO, b"\x02", *_opcodes(value), pickle.STOP))


def _opcodes(value: object) -> Iterator[bytes]:
    match value:
        case tuple():
            yield from (pickle.MARK, *(part for item in value for part in _opcodes(item)), pickle.TUPLE)
        case list():
            parts = (part for item in value for part in _opcodes(item))
            yield from (pickle.EMPTY_LIST, pickle.MARK, *parts, pickle.APPENDS)
        case dict():
            parts = (part for pair in value.items() for item in pair for part in _opcodes(item))
            yield from (pickle.EMPTY_DICT, pickle.MARK, *parts, pickle.SETITEMS)
        case Global(module, name):
            yield pickle.GLOBAL + f"{module}\n{name}\n".encode()
        case Call(function, arguments):
            yield from (*_opcodes(function), *_opcodes(arguments), pickle.REDUCE)
        case Storage(key):
            yield from (*_opcodes(key), pickle.BINPERSID)
        case _:
            yield pickle.dumps(value, 2)[2:-1]  # without its own protocol and end


class SavedFile(io.RawIOBase):
    """A file of torch.save in memory, apart from large pieces: those are a tensor's numbers, written later."""

    LARGE = 1 << 16

    def __init__(self, content: object, num_bytes: int = 0) -> None:
        """Write what torch.save writes for `content`, with room for the numbers of one tensor."""
        super().__init__()
        self.pieces: dict[int, bytes] = {}  # by their offset
        self.size = self._start = 0  # of the file so far, and of the piece that is being written
        with zipfile.ZipFile(self, "w") as archive:
            archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pickled(content))
            archive.writestr(zipfile.ZipInfo("archive/byteorder"), b"little")
            if num_bytes:
                # The archive's checksum is that of zeros, and torch.load does not read it.
                with archive.open(zipfile.ZipInfo(DATA), "w", force_zip64=True) as numbers:
                    for start in range(0, num_bytes, len(ZEROS)):
                        numbers.write(ZEROS[: num_bytes - start])
            archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")

    def write(self, content: Any) -> int:
        """Take the next bytes, as a file does."""
        self.size += len(content)
        if len(content) < self.LARGE:
            self.pieces[self._start] = self.pieces.get(self._start, b"") + bytes(content)
        else:
            self._start = self.size
        return len(content)


def data_begin(archive: bytes) -> int | None:
    """Find a tensor's numbers in a file of torch.save, by the local header: 30 bytes, name, extra field. None where it
    is another archive."""
    header = archive.find(DATA.encode()) - 30
    name_length, extra_length = (int.from_bytes(archive[header + at : header + at + 2], "little") for at in (26, 28))
    if header < 0 or archive[header : header + 4] != b"PK\x03\x04" or name_length != len(DATA):
        return None
    return header + 30 + name_length + extra_length
