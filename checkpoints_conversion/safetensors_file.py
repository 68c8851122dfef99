"""safetensors files by their header: a length, JSON, then the tensors' bytes. So a file can be sized before it is
filled, and filled by several processes."""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import orjson

from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.json_files import MAX_OBJECT_BYTES, parse_object

ALIGNMENT = 8
METADATA = {"format": "pt"}  # transformers wants it
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file; `offset` is in bytes from the beginning of the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int = field(default=0, kw_only=True)

    @property
    def nbytes(self) -> int:
        """Size on disk, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


T = TypeVar("T", bound=FileTensor)


def lay_out(tensors: Sequence[T]) -> tuple[bytes, list[T], int]:
    """Return a file's header, its tensors with their offsets, in this order, and its size in bytes."""
    header: dict[str, object] = {"__metadata__": METADATA}
    ends = list(accumulate(tensor.nbytes for tensor in tensors))
    for tensor, end in zip(tensors, ends, strict=True):
        span = [end - tensor.nbytes, end]
        header[tensor.name] = {"dtype": tensor.dtype.value, "shape": tensor.shape, "data_offsets": span}
    text = orjson.dumps(header)
    text += b" " * (-len(text) % ALIGNMENT)
    start = 8 + len(text)
    placed = [replace(tensor, offset=start + end - tensor.nbytes) for tensor, end in zip(tensors, ends, strict=True)]
    return len(text).to_bytes(8, "little") + text, placed, start + ends[-1]


def read_header(path: Path) -> dict[str, FileTensor]:
    """Return the tensors of a file by name. ValueError when it is missing, truncated or of another format."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: download or convert the model again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_OBJECT_BYTES):
            raise ValueError(f"{path} is truncated or no safetensors file: download or convert it again")
        header = parse_object(file.read(length), path)
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, 8 + length, path) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda one: (one.offset, one.nbytes)):
        if tensor.offset < end:
            raise ValueError(f"{path}: {tensor.name} overlaps another tensor: download or convert it again")
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise ValueError(
                f"{path} is truncated: it has {size:,} bytes, and {tensor.name} ends at byte {end:,}: "
                "download or convert it again"
            )
    return tensors


def _tensor(name: str, entry: Any, start: int, path: Path) -> FileTensor:
    """Return a tensor by its entry in a header. ValueError when the entry has another form."""
    dtypes = {dtype.value: dtype for dtype in DType}
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            if dtype not in dtypes:
                known = ", ".join(dtypes)
                raise ValueError(f"{path}: {name} is of dtype {dtype}, supported are {known}: give another model")
            if all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
                tensor = FileTensor(name, dtypes[dtype], tuple(shape), offset=start + begin)
                if tensor.nbytes == end - begin:
                    return tensor
    raise ValueError(f"{path}: {name} has not the bytes of its shape: download or convert it again")


def same_bytes(one: Path, first: FileTensor, other: Path, second: FileTensor) -> bool:
    """Tell whether two tensors have the same dtype, shape and bytes, which are read up to the first difference."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if first.offset == second.offset and one.samefile(other):
        return True
    with one.open("rb") as left, other.open("rb") as right:
        left.seek(first.offset)
        right.seek(second.offset)
        return same_blocks(left, right, first.nbytes)


def same_blocks(left: BinaryIO, right: BinaryIO, nbytes: int) -> bool:
    """Tell whether the next bytes of two open files are the same."""
    sizes = (min(BLOCK_BYTES, nbytes - start) for start in range(0, nbytes, BLOCK_BYTES))
    return all(left.read(size) == right.read(size) for size in sizes)


def read_scale(path: Path, header: Mapping[str, FileTensor], name: str) -> float:
    """Read a positive fp32 number. ValueError when the file has none of this name."""
    tensor = header.get(name)
    if tensor is None or tensor.dtype is not DType.FLOAT32 or tensor.nbytes != DType.FLOAT32.itemsize:
        raise ValueError(f"{path} has no fp32 number {name}, and the weight it belongs to is FP8: convert it again")
    with path.open("rb") as file:
        file.seek(tensor.offset)
        (scale,) = struct.unpack("<f", file.read(4))
    if not 0 < scale < math.inf:
        raise ValueError(f"{path}: {name} is {scale}: convert the model again")
    return float(scale)
