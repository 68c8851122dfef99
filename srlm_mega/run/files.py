"""Writing and removing files so that a kill leaves nothing that looks whole."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from srlm_mega.errors import UserError, naming

LEFT_OVER = re.compile(r"\..+\.[^.].*\.(?P<pid>\d+)")  # as `replacing` names a file while it is written
LONG_SECONDS = 3600.0  # no write takes so long


def remove_folder(path: Path, renamed: Path) -> None:
    """Rename a folder and remove it, so that a kill in between leaves nothing that looks whole. A link goes without
    what it points to."""
    discard(renamed)  # left by a removal that was killed
    os.rename(path, renamed)
    discard(renamed)


def discard(path: Path) -> None:
    """Remove a folder with its content, a file, or a link without what it points to; do nothing where there is none.
    Another process may remove the same, or a part of it, meanwhile."""
    while path.is_dir() and not path.is_symlink():
        with suppress(FileNotFoundError):
            shutil.rmtree(path)
    if os.path.lexists(path):
        path.unlink(missing_ok=True)


def dangling(path: Path) -> str | None:
    """Return what is wrong with a link whose target is not there, in words; None for anything else."""
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {os.readlink(path)}, which is not there"
    return None


def existing_run(run: Path) -> Path:
    """Return the folder. UserError if it is not a run's."""
    if (found := dangling(run)) is not None:
        raise UserError(f"{found}: bring it back")
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml. `srlm run CONFIG` makes one.")
    return run


def is_stream(path: Path) -> bool:
    """Tell whether a path is a device or a pipe, such as /dev/null or what /dev/stdout is."""
    return path.exists() and not (path.is_file() or path.is_dir())


def check_place(path: Path, is_folder: bool = False) -> None:
    """Make the folders above what a command writes at its end, a file or a folder, and write there for a moment.
    UserError or OSError, with the path, where it could not be written: before the work, and not after it."""
    target = Path(os.path.realpath(path))
    if is_stream(path):
        return
    if target.is_dir() and not is_folder:
        raise UserError(f"{path} is a folder: give the name of a file")
    if path.is_symlink() and not target.parent.is_dir():
        raise UserError(f"{dangling(path)}: bring that back, or give another name")
    draft = draft_of(target / "draft" if target.is_dir() else target)
    try:
        if target.exists() and not target.is_dir():  # written in place
            with target.open("ab"):
                return
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def draft_of(path: Path) -> Path:
    """Return the name of a file while this process writes it."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")


@contextmanager
def replacing(path: Path, writer: str | None = None) -> Iterator[Path]:
    """Yield the path of a temporary file for the block to write. It is then synced to the disk and gets its name, or,
    after an error, is removed. `writer`: what keeps the temporary files of several writers apart; default: host and
    process. A device or a pipe is written itself: it would be replaced by a file."""
    if is_stream(path):
        with naming(path):
            yield path
        return
    temporary = draft_of(path) if writer is None else path.with_name(f".{path.name}.{writer}")
    try:
        with naming(path):
            yield temporary
            fsync(temporary)
            os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: bytes) -> None:
    """Write a small file so that readers see the old or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_durably(path: Path, write: Callable[[Path], object], writer: str | None = None) -> None:
    """Let `write` fill a temporary file, sync it to the disk, and only then give it its name. `writer`: as for
    `replacing`."""
    with replacing(path, writer) as temporary:
        write(temporary)
    fsync(path.parent)


def all_files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, not through links."""
    return (Path(root) / name for root, _, names in os.walk(folder) for name in names)


def is_old(path: Path) -> bool:
    """Tell whether a file was written so long ago that no write of it is under way."""
    return time.time() - path.lstat().st_mtime > LONG_SECONDS


def sweep(paths: Iterable[Path], elsewhere: Callable[[Path], bool] = is_old) -> None:
    """Remove those of these files that killed writers left. `elsewhere`: function that tells whether another machine's
    writer of a file is dead."""
    here = os.uname().nodename
    for path in paths:
        if (match := LEFT_OVER.fullmatch(path.name)) is not None:
            ours = path.name.endswith(f".{here}.{match['pid']}")
            with suppress(FileNotFoundError):
                if elsewhere(path) if not ours else not Path(f"/proc/{match['pid']}").exists():
                    path.unlink()


def fsync(path: Path) -> None:
    """Make a file or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
