"""Read any checkpoint as rows of Hugging Face's tensors, with a few blocks in memory at a time."""

import os
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from srlm_mega.checkpoints_conversion.bits import Bits, DType, is_finite, largest_magnitude, to_float32
from srlm_mega.checkpoints_conversion.llama import LlamaShape, huggingface_shapes
from srlm_mega.checkpoints_conversion.patches import Matrix, Patch, matrix_size

CACHED_BLOCKS = 4


class Encoding(Protocol):
    """A form in which a file holds numbers that are read as float32, such as GGUF's quantised blocks."""

    @property
    def name(self) -> str:
        """Name of the form, such as Q4_K."""
        ...

    def nbytes(self, count: int) -> int:
        """Return the size of so many numbers of a row, in bytes."""
        ...

    def decode(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the numbers of rows of bytes."""
        ...


@dataclass(frozen=True)
class Widened:
    """The encoding of 16-bit numbers that are read as float32, which holds each of them exactly."""

    dtype: DType

    @property
    def name(self) -> str:
        """Name of the form, such as BF16."""
        return self.dtype.value

    def nbytes(self, count: int) -> int:
        """Return the size of so many numbers of a row, in bytes."""
        return count * self.dtype.itemsize

    def decode(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the numbers of rows of bytes."""
        return to_float32(rows.view(self.dtype.storage), self.dtype)


@dataclass(frozen=True)
class Stored:
    """A matrix in a file of a checkpoint: its bits begin at byte `offset`, row by row. `scale` is for FP8."""

    name: str
    file: str
    offset: int
    dtype: DType
    matrix: Matrix
    scale: float | None = None
    encoding: Encoding | None = None  # with it, `dtype` is float32

    @property
    def row_bytes(self) -> int:
        """Size of one row in the file, in bytes."""
        if self.encoding is not None:
            return self.encoding.nbytes(self.matrix.columns)
        return self.matrix.columns * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Size of all rows in the file, in bytes."""
        return self.matrix.rows * self.row_bytes


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. `config` is its config.json in Hugging Face's keys, `dtype` the format in which unscaled tensors
    are read, `kept` the one that a conversion keeps where that is narrower."""

    folder: Path
    kind: str
    shape: LlamaShape
    config: dict[str, Any]
    dtype: DType
    stored: tuple[Stored, ...]
    kept: DType | None = None

    @cached_property
    def sources(self) -> dict[str, "TensorSource"]:
        """Places of each of Hugging Face's tensors, by name. ValueError when a part of one is missing."""
        found: dict[str, list[tuple[Patch, Stored]]] = defaultdict(list)
        for stored in self.stored:
            for patch in stored.matrix.patches:
                found[patch.source].append((patch, stored))
        sources = {}
        for name, size in huggingface_shapes(self.shape).items():
            rows, columns = matrix_size(size)
            cover: dict[tuple[int, ...], tuple[Patch, Stored]] = {}
            replicas: list[tuple[Patch, Stored, Stored]] = []
            for patch, stored in found[name]:
                rectangle = (patch.source_row, patch.source_column, patch.rows, patch.columns)
                part = Patch(name, patch.row, patch.column, *rectangle)
                if rectangle in cover:
                    replicas.append((part, stored, cover[rectangle][1]))
                else:
                    cover[rectangle] = (part, stored)
            held = sum(patch.rows * patch.columns for patch, _ in cover.values())
            if held != rows * columns:
                numbers = f"{held:,} of the {rows * columns:,} numbers of {name}"
                raise ValueError(f"{self.folder} holds {numbers}, a part is missing: convert it again")
            if len({(stored.dtype, stored.scale) for _, stored in cover.values()}) > 1:
                raise ValueError(f"{self.folder}: the parts of {name} differ in dtype or scale: convert it again")
            sources[name] = TensorSource(name, rows, columns, tuple(cover.values()), tuple(replicas))
        return sources

    @property
    def is_fp8(self) -> bool:
        """True when some weights are FP8."""
        return any(stored.dtype is DType.FLOAT8_E4M3 for stored in self.stored)

    @property
    def is_mixed(self) -> bool:
        """True when some weights are of another dtype than others, and all are read as float32."""
        return any(isinstance(stored.encoding, Widened) for stored in self.stored)

    @property
    def num_bytes(self) -> int:
        """Size of all stored matrices as they are read, in bytes."""
        return sum(item.matrix.rows * item.matrix.columns * item.dtype.itemsize for item in self.stored)

    @property
    def formats(self) -> dict[str, int]:
        """Number of stored matrices of each format, by its name in the file."""
        return dict(Counter(item.encoding.name if item.encoding else item.dtype.value for item in self.stored))

    def check(self) -> "Checkpoint":
        """Return the checkpoint. ValueError when a file is missing or too short, or a tensor lacks a part."""
        assert self.sources
        ends: dict[str, Stored] = {}
        for stored in self.stored:
            last = ends.get(stored.file)
            if last is None or stored.offset + stored.nbytes > last.offset + last.nbytes:
                ends[stored.file] = stored
        for file, last in ends.items():
            path = self.folder / file
            if not path.is_file():
                raise ValueError(f"{path} is missing, and should hold {last.name}: download or convert it again")
            size, due = path.stat().st_size, last.offset + last.nbytes
            if size < due:
                raise ValueError(
                    f"{path} is truncated: it has {size:,} bytes, and {last.name} ends at byte {due:,}: "
                    "download or convert it again"
                )
        return self


@dataclass(frozen=True)
class TensorSource:
    """The places of a tensor: parts that cover it once, and replicas of some of them. Patches here are inverse to those
    of the stored matrices: rectangles of the tensor, taken from a stored matrix."""

    name: str
    rows: int
    columns: int
    cover: tuple[tuple[Patch, Stored], ...]
    replicas: tuple[tuple[Patch, Stored, Stored], ...]  # the last is what it must equal

    @property
    def dtype(self) -> DType:
        """Format of its parts, which is the same for all."""
        return self.cover[0][1].dtype

    @property
    def row_bytes(self) -> int:
        """Size of one row, in bytes."""
        return self.columns * self.dtype.itemsize


class Scratch:
    """Memory that is used again and again: getting fresh pages from the system costs more than copying."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, rows: int, columns: int, dtype: DType) -> Bits:
        """Return a matrix in this memory; what was taken before is lost."""
        nbytes = rows * columns * dtype.itemsize
        if nbytes > self._memory.size:
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes].view(dtype.storage).reshape(rows, columns)


class Reader(ExitStack):
    """Reads rows of Hugging Face's tensors, and keeps the newest blocks: several ranks need parts of each."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self._files: dict[str, int] = {}  # closed when the stack is left
        self._blocks: OrderedDict[tuple[str, int, int], tuple[Scratch, Bits]] = OrderedDict()
        self._part = Scratch()
        self.largest: dict[str, int] = {}  # per tensor, `largest_magnitude` of the rows read so far

    def rows(self, name: str, start: int, count: int) -> Bits:
        """Return [count, columns] of a tensor, which must not be changed and is overwritten after four others.

        ValueError names the file where numbers are missing, not finite, or unlike those of a replica.
        """
        key = (name, start, count)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key][1]
        is_full = len(self._blocks) >= CACHED_BLOCKS
        memory = self._blocks.popitem(last=False)[1][0] if is_full else Scratch()
        source = self._checkpoint.sources[name]
        block = self._assemble(source, start, count, memory)
        self._check_finite(source, block)
        for patch, stored, original in source.replicas:
            part = patch.window(start, count, 0, source.columns)
            if part is not None and not np.array_equal(self._read_part(stored, part), block[part.target]):
                raise ValueError(
                    f"{self._checkpoint.folder / stored.file}: {stored.name} differs from the copy of {name} "
                    f"in {original.file}, and should be a replica: convert it again"
                )
        self._blocks[key] = (memory, block)
        return block

    def blocks(self, name: str, block_bytes: int) -> Iterator[Bits]:
        """Yield all rows of a tensor in order, at most `block_bytes` (or one row) at a time."""
        source = self._checkpoint.sources[name]
        step = max(1, block_bytes // source.row_bytes)
        for start in range(0, source.rows, step):
            yield self.rows(name, start, min(step, source.rows - start))

    def _assemble(self, source: TensorSource, start: int, count: int, memory: Scratch) -> Bits:
        assert start + count <= source.rows, f"rows {start} to {start + count} of {source.name} do not exist"
        block = memory.take(count, source.columns, source.dtype)
        for patch, stored in source.cover:
            part = patch.window(start, count, 0, source.columns)
            if part is None:
                continue
            if (part.rows, part.columns) == block.shape and stored.matrix.columns == source.columns:
                return self._read(stored, part.source_row, count, memory)  # at once to where it should be
            block[part.target] = self._read_part(stored, part)
        return block

    def _check_finite(self, source: TensorSource, block: Bits) -> None:
        if source.dtype is DType.FLOAT8_E4M3:
            return
        magnitude = largest_magnitude(block, source.dtype)
        if not is_finite(magnitude, source.dtype):
            files = sorted({stored.file for _, stored in source.cover})
            raise ValueError(
                f"{self._checkpoint.folder / files[0]}: {source.name} holds values that are not finite: "
                "the model is broken, take another"
            )
        self.largest[source.name] = max(magnitude, self.largest.get(source.name, 0))

    def _read_part(self, stored: Stored, part: Patch) -> Bits:
        rows = self._read(stored, part.source_row, part.rows, self._part)
        return rows[:, part.source_column : part.source_column + part.columns]

    def _read(self, stored: Stored, row: int, count: int, memory: Scratch) -> Bits:
        if stored.file not in self._files:
            self._files[stored.file] = os.open(self._checkpoint.folder / stored.file, os.O_RDONLY)
            self.callback(os.close, self._files[stored.file])
        if stored.encoding is None:
            block = memory.take(count, stored.matrix.columns, stored.dtype)
        else:
            block = np.empty((count, stored.row_bytes), np.uint8)
        rest = block.view(np.uint8).reshape(-1).data
        position = stored.offset + row * stored.row_bytes
        while rest:
            number = os.preadv(self._files[stored.file], [rest], position)
            if number == 0:
                raise ValueError(
                    f"{self._checkpoint.folder / stored.file} ends within {stored.name}: download or convert it again"
                )
            rest, position = rest[number:], position + number
        return block if stored.encoding is None else stored.encoding.decode(block).view(stored.dtype.storage)
