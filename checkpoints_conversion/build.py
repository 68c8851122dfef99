"""Write a checkpoint from another one: files of their final size, filled block by block by several processes.

Everything happens in `<destination>.partial`, which is renamed when it is complete. Killed and started again, the same
conversion resumes with the tensors that its journal does not name.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np
import xxhash

from srlm_mega.checkpoints_conversion.bits import Bits, DType, cast
from srlm_mega.checkpoints_conversion.patches import row_window
from srlm_mega.checkpoints_conversion.reader import CACHED_BLOCKS, Checkpoint, Reader, Scratch, Stored

MAX_BLOCK_BYTES = 1024**2  # larger blocks leave the processor's caches and are slower
BLOCKS_PER_JOB = CACHED_BLOCKS + 4  # those the reader keeps, and what is made of one
JOURNAL = ".journal"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Task = tuple[Stored, ...]
Report = Callable[[int], None]  # bytes that were written since the last call
QuantizeFunction = Callable[[Bits, DType, float], Bits]  # 16-bit numbers, their format, a scale -> FP8


@dataclass(frozen=True)
class OutputFile:
    """A file to be written: its size, and the bytes that are known before any tensor is read, as (offset, bytes)."""

    name: str
    size: int
    constants: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class Plan:
    """A checkpoint to be written: all files, all matrices, and `texts`, small files that are written last, by their
    paths below the destination. `folder` is the one below it that holds the model."""

    kind: str
    dtype: DType
    outputs: tuple[OutputFile, ...]
    stored: tuple[Stored, ...]
    texts: Mapping[str, bytes] = field(default_factory=dict)
    quantizer: QuantizeFunction | None = None
    folder: Path = Path()

    @property
    def num_bytes(self) -> int:
        """Size of all matrices, in bytes."""
        return sum(stored.nbytes for stored in self.stored)

    def tasks(self) -> list[Task]:
        """Group the matrices that are made of the same tensors: filled together, these are read once."""
        groups: dict[str, list[Stored]] = {}
        for stored in self.stored:
            if stored.matrix.patches:  # a part that is only padding is 0 already
                groups.setdefault(stored.matrix.patches[0].source, []).append(stored)
        return [tuple(group) for group in groups.values()]


@dataclass(frozen=True)
class Resources:
    """Processes to use, and the bytes that the blocks of all of them may take together."""

    jobs: int = 1
    max_memory: int = 1024**3

    @property
    def block_bytes(self) -> int:
        """Size of one block, in bytes; a row that is larger is a block of its own."""
        return min(MAX_BLOCK_BYTES, self.max_memory // (self.jobs * BLOCKS_PER_JOB))


@dataclass(frozen=True)
class MatrixWriter:
    """Fills the matrices of a plan; each process has its own."""

    source: Checkpoint
    plan: Plan
    folder: Path
    block_bytes: int

    def fill(self, tasks: Sequence[tuple[int, Task]], report: Report) -> None:
        """Fill the matrices of these tasks, and note each finished one in the journal."""
        files: dict[str, FileIO] = {}
        scratch = Scratch()
        with Reader(self.source) as reader, (self.folder / JOURNAL).open("ab") as journal:
            for number, task in tasks:
                for stored, start, count in self._blocks(task):
                    if stored.file not in files:
                        file = (self.folder / stored.file).open("r+b", buffering=0)
                        files[stored.file] = reader.enter_context(file)
                    block = self._block(reader, stored, start, count, scratch)
                    _write_at(files[stored.file].fileno(), block, stored.offset + start * stored.row_bytes)
                    report(block.nbytes)
                journal.write(f"{number}\n".encode())
                journal.flush()

    def _blocks(self, task: Task) -> list[tuple[Stored, int, int]]:
        """Return a task's blocks as (matrix, first row, rows); those of the same source rows follow one another."""
        blocks = []
        for stored in task:
            sources = {patch.source for patch in stored.matrix.patches}
            row_bytes = max(self.source.sources[name].row_bytes for name in sources)
            step = max(1, self.block_bytes // row_bytes)
            blocks += [
                (stored, start, min(step, stored.matrix.rows - start)) for start in range(0, stored.matrix.rows, step)
            ]
        return sorted(blocks, key=lambda block: block[0].matrix.patches[0].source_row + block[1])

    def _block(self, reader: Reader, stored: Stored, start: int, count: int, scratch: Scratch) -> Bits:
        window = row_window(stored.matrix, start, count)
        block = scratch.take(count, window.columns, self.source.dtype)
        if not window.is_full:  # the rest is padding
            block.fill(0)
        for patch in window.patches:
            rows = reader.rows(patch.source, patch.source_row, patch.rows)
            if rows.shape == block.shape:
                return self._convert(rows, stored)
            block[patch.target] = rows[:, patch.source_column : patch.source_column + patch.columns]
        return self._convert(block, stored)

    def _convert(self, block: Bits, stored: Stored) -> Bits:
        try:
            block = cast(block, self.source.dtype, self.plan.dtype)
        except ValueError as error:
            raise ValueError(f"{self.source.folder}: {stored.matrix.patches[0].source}: {error}") from None
        if stored.scale is None:
            return block
        assert self.plan.quantizer is not None, f"{stored.name} has a scale and the plan no quantizer"
        return self.plan.quantizer(block, self.plan.dtype, stored.scale)


def _write_at(descriptor: int, block: Bits, position: int) -> None:
    rest = block.view(np.uint8).reshape(-1).data
    while rest:
        number = os.pwrite(descriptor, rest, position)
        rest, position = rest[number:], position + number


def partial_folder(destination: Path) -> Path:
    """Return the folder in which a checkpoint is written before it is renamed."""
    return destination.with_name(destination.name + ".partial")


def check_new(destination: Path) -> None:
    """ValueError when there is something already."""
    if os.path.lexists(destination):
        raise ValueError(f"{destination} exists already: remove it or choose another name")


@contextmanager
def building(
    source: Checkpoint, plan: Plan, destination: Path, block_bytes: int
) -> Iterator[tuple[MatrixWriter, set[int]]]:
    """Make the files of a conversion at their final size, or find them from before; yields their writer and the numbers
    of the finished tasks. Without an error, the end of the block syncs everything and renames the folder.

    ValueError when the destination exists or another process writes it, OSError when the disk is full.
    """
    check_new(destination)
    folder = partial_folder(destination)
    (folder / plan.folder).mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is being written by another process: wait for it, or end it") from None
        signature = _signature(source, plan)
        done = _finished_tasks(folder, signature, plan.outputs)
        if done is None:
            for path in folder.iterdir():
                path.unlink() if path.is_file() else shutil.rmtree(path)
            (folder / plan.folder).mkdir(exist_ok=True)
            for output in plan.outputs:
                allocate(folder / output.name, output)
        # Without a line that was cut off: the next one would be joined to it.
        (folder / JOURNAL).write_text("\n".join([signature, *map(str, sorted(done or ())), ""]))
        yield MatrixWriter(source, plan, folder, block_bytes), done or set()
        for name, content in plan.texts.items():
            (folder / name).write_bytes(content)
        (folder / JOURNAL).unlink()
        give_name(folder, destination)
    finally:
        os.close(lock)


def _signature(source: Checkpoint, plan: Plan) -> str:
    """Hash the source's files as they are, the plan, and this boot: what a crash of the machine left is not trusted."""
    digest = xxhash.xxh3_128(repr((plan.kind, plan.dtype, plan.outputs, plan.stored)).encode())
    for file in sorted({stored.file for stored in source.stored}):
        status = (source.folder / file).stat()
        digest.update(f"{(source.folder / file).resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    digest.update(BOOT_ID.read_bytes() if BOOT_ID.is_file() else b"")
    return digest.hexdigest()


def _finished_tasks(folder: Path, signature: str, outputs: Sequence[OutputFile]) -> set[int] | None:
    """Return the numbers of the finished tasks, or None when there is nothing to resume, or a file was cut since."""
    journal = folder / JOURNAL
    lines = journal.read_text().split("\n") if journal.is_file() else [""]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}
    if lines[0] != signature or any(sizes.get(output.name) != output.size for output in outputs):
        return None
    return {int(line) for line in lines[1:-1]}  # a line without its end was cut off


def allocate(path: Path, output: OutputFile) -> None:
    """Make a file of its final size with the bytes that are known. OSError, with its name, when the disk is full."""
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, output.size)
        except OSError as error:  # as a rule a full disk, and the system does not say which file it was
            raise OSError(error.errno, f"{error.strerror} ({output.size:,} bytes are needed)", str(path)) from None
        for offset, content in output.constants:
            file.seek(offset)
            file.write(content)  # all of it, where os.pwrite may write a part


def give_name(folder: Path, destination: Path) -> None:
    """Sync a finished folder, then rename it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    os.replace(folder, destination)
    sync(destination.parent)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
