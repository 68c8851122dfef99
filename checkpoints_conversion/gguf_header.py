"""GGUF files by their header: the metadata, and where each tensor lies.

The library's own reader makes an array of every token and merge: half a minute and 600 MB for Llama 3's vocabulary.
"""

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # the name that llama.cpp's tools give a part
FORMATS = {  # of struct
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: `shape` as torch has it, `offset` in bytes from the beginning of the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes. ValueError when its rows are not whole blocks of its type."""
        numbers, size = GGML_QUANT_SIZES[self.kind]
        if self.shape[-1] % numbers:
            raise ValueError(f"{self.name} has rows of {self.shape[-1]}, which are not blocks of {numbers}")
        return math.prod(self.shape) // numbers * size


@dataclass(frozen=True)
class GgufHeader:
    """The metadata of a whole GGUF file by key, and its tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def tensor(self, name: str) -> GgufTensor:
        """Return a tensor. ValueError when the file has none of this name."""
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no tensor {name}, and a Llama has: download or convert it again")
        return self.tensors[name]


class _Cursor:
    """A place in a file's bytes, which moves on as values are read. struct.error or ValueError behind the end."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self.position = len(MAGIC)

    def numbers(self, code: str, count: int = 1) -> list[Any]:
        values = struct.unpack_from(f"<{count}{code}", self._content, self.position)
        self.position += struct.calcsize(f"<{count}{code}")
        return list(values)

    def string(self) -> str:
        (length,) = self.numbers("Q")
        content = self._content[self.position : self.position + length]
        if len(content) < length:
            raise ValueError(f"a text of {length:,} bytes ends behind the file")
        self.position += length
        return content.decode()

    def value(self) -> Any:
        kind = GGUFValueType(*self.numbers("I"))
        if kind is not GGUFValueType.ARRAY:
            return self._values(kind, 1)[0]
        (item,), (count,) = self.numbers("I"), self.numbers("Q")
        return self._values(GGUFValueType(item), count)

    def _values(self, kind: GGUFValueType, count: int) -> list[Any]:
        match kind:
            case GGUFValueType.STRING:
                return [self.string() for _ in range(count)]
            case GGUFValueType.ARRAY:
                raise ValueError("arrays of arrays are not supported")
            case _:
                return self.numbers(FORMATS[kind], count)

    def tensor(self) -> GgufTensor:
        name = self.string()
        (dimensions,) = self.numbers("I")
        shape = tuple(reversed(self.numbers("Q", dimensions))) or (1,)
        (kind,), (offset,) = self.numbers("I"), self.numbers("Q")
        return GgufTensor(name, GGMLQuantizationType(kind), shape, offset)


def is_gguf(path: Path) -> bool:
    """Tell whether a file begins as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> GgufHeader:
    """Read a file's header. ValueError when it is truncated, of another format or byte order, or a part of a model."""
    if not is_gguf(path):
        raise ValueError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}; download it again")
    part = PART.search(path.name)
    if part is not None and int(part[2]) > 1:
        raise _is_part(path, int(part[2]))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            header = _parse(path, _Cursor(content))
            ends = {tensor.offset + tensor.nbytes: tensor.name for tensor in header.tensors.values()}
        except (struct.error, ValueError, ArithmeticError) as error:
            raise ValueError(f"{path} is truncated or damaged ({error}): download it again") from None
        size = len(content)
    if header.metadata.get("split.count", 1) > 1:
        raise _is_part(path, header.metadata["split.count"])
    if ends and max(ends) > size:
        raise ValueError(
            f"{path} is truncated: it has {size:,} bytes, and {ends[max(ends)]} ends at byte {max(ends):,}: "
            "download it again"
        )
    return header


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    (version,) = cursor.numbers("I")
    if version not in VERSIONS:
        raise ValueError(f"version {version:#x}, supported are {VERSIONS} in little-endian order")
    num_tensors, num_values = cursor.numbers("Q", 2)
    metadata = {cursor.string(): cursor.value() for _ in range(num_values)}
    tensors = [cursor.tensor() for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(
        path,
        metadata,
        {item.name: GgufTensor(item.name, item.kind, item.shape, start + item.offset) for item in tensors},
    )


def _is_part(path: Path, count: int) -> ValueError:
    join = "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
    return ValueError(f"{path} is one of {count} parts of a model: join them ({join}) and give the whole file")
