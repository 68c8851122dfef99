"""safetensors files by their header: a length, JSON, then the tensors' bytes. So a file can be sized before it is
filled, and filled by several processes."""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, TypeVar

import orjson

from srlm_mega.checkpoints_conversion.bits import DType

ALIGNMENT = 8
METADATA = {"format": "pt"}  # transformers wants it
BLOCK_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


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
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path} is truncated or no safetensors file: download or convert it again")
        try:
            header = orjson.loads(file.read(length))
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{path} is no safetensors file ({error}): download or convert it again") from None
    dtypes = {dtype.value: dtype for dtype in DType}
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in dtypes:
            known = ", ".join(dtypes)
            raise ValueError(f"{path}: {name} is of dtype {entry['dtype']}, supported are {known}: give another model")
        begin, end = entry["data_offsets"]
        tensor = FileTensor(name, dtypes[entry["dtype"]], tuple(entry["shape"]), offset=8 + length + begin)
        if tensor.nbytes != end - begin:
            raise ValueError(f"{path}: {name} has not the bytes of its shape: download or convert it again")
        if tensor.offset + tensor.nbytes > size:
            raise ValueError(
                f"{path} is truncated: it has {size:,} bytes, and {name} ends at byte "
                f"{tensor.offset + tensor.nbytes:,}: download or convert it again"
            )
        tensors[name] = tensor
    return tensors


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
