"""The ways a run ends early, and their exit codes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, EEXIST, EIO, EISDIR, ENAMETOOLONG, ENOENT, ENOSPC, ENOTDIR, EPERM, EROFS, ESTALE
from pathlib import Path

CRASHED, USER_ERROR, CANNOT_CONTINUE, STOP_REQUESTED, PAUSED = 1, 2, 3, 4, 5
ENGINE_DIED = 6  # of a replica: another one may take its shards
DISK_FAILED = frozenset({ENOSPC, EDQUOT, EIO, ESTALE})
NOT_USABLE = frozenset({ENOENT, EACCES, EPERM, EROFS, ENOTDIR, EISDIR, EEXIST, ENAMETOOLONG})


class UserError(ValueError):
    """A mistake in what the user gave: says what, what it got and what to do. Exit code 2."""


class CannotContinue(Exception):
    """The run cannot continue, and nothing is wrong with the software: says why and how to resume. Exit code 3."""


class StopRequested(Exception):
    """Somebody asked the run to stop: says where it stands. The same command resumes it. Exit code 4."""


class TrainingPaused(Exception):
    """Training waits until its newest checkpoint is compared; the controller compares it and starts training again."""


class StageCrashed(Exception):
    """A stage's process ended without an explanation: shows the end of its log. Exit code 1."""


# Ends that a stage explains, by the exit codes of their processes.
ENDS = {USER_ERROR: UserError, CANNOT_CONTINUE: CannotContinue, STOP_REQUESTED: StopRequested, PAUSED: TrainingPaused}


def exit_code(error: Exception) -> int:
    """Return the exit code of a command that ends with this error."""
    if isinstance(error, OSError):
        if error.errno in DISK_FAILED:
            return CANNOT_CONTINUE
        return USER_ERROR if error.errno in NOT_USABLE else CRASHED
    return next((code for code, kind in ENDS.items() if isinstance(error, kind)), CRASHED)


def reason(error: Exception) -> str:
    """Return an error's message; for an operating system's error the file, what is wrong, and what to do."""
    if not isinstance(error, OSError):
        return str(error)
    known = isinstance(error.filename, str | Path)
    path = Path(error.filename if known else "a file without a name")
    return f"{path}: {error.strerror}: {os_remedy(error.errno, path, f'{space_left(path)}. ' if known else '')}"


def os_remedy(number: int | None, path: Path, room: str) -> str:
    """Return what to do about an operating system's error at a path, given its number. `room`: a sentence on how much
    there is, or nothing."""
    match number:
        case n if n == ENOSPC:
            return f"{room}Make room there; the same command resumes the run"
        case n if n == EDQUOT:
            return f"your quota there is used up (`quota -s`). {room}Make room; the same command resumes"
        case n if n in (EIO, ESTALE):
            return "the disk or the network's file system failed (`dmesg`). Once it works, the same command resumes"
        case n if n == EROFS:
            return "its file system is mounted read-only: have it mounted for writing, or give another run.dir"
        case n if n in (EACCES, EPERM):
            return "you may not do this there (`ls -ld` shows who may): change its rights, or give another path"
        case n if n == ENAMETOOLONG:
            return f"the path has {len(str(path))} characters, its last part {len(path.name)}: give a shorter one"
        case _:
            return "give another path"


def space_left(path: Path) -> str:
    """Return in words how much room the file system of a path has."""
    place = next((folder for folder in (path, *path.parents) if os.path.exists(folder)), Path("."))
    try:
        found = os.statvfs(place)
    except OSError:
        return "its file system does not say how much is free"
    free, size = (blocks * found.f_frsize / 2**20 for blocks in (found.f_bavail, found.f_blocks))
    names = ", and it has no room for more files (inodes)" if found.f_files and not found.f_favail else ""
    return f"{free:,.0f} MiB of {size:,.0f} MiB are free on its file system{names}"


def is_full(path: Path) -> bool:
    """Tell whether the file system of a path has no room for another small file."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize < 2**20 or (found.f_files > 0 and found.f_favail == 0)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the file's name to an operating system's error that has none: a failed write does not say where."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in DISK_FAILED | NOT_USABLE:
            error.filename = str(path)
        raise
