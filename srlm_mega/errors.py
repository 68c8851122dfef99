"""The ways a run ends early, and their exit codes."""

from errno import EACCES, EDQUOT, EEXIST, EISDIR, ENAMETOOLONG, ENOENT, ENOSPC, ENOTDIR, EPERM, EROFS

CRASHED, USER_ERROR, CANNOT_CONTINUE, STOP_REQUESTED, PAUSED = 1, 2, 3, 4, 5
ENGINE_DIED = 6  # of a replica: another one may take its shards
NO_SPACE = frozenset({ENOSPC, EDQUOT})
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
        if error.errno in NO_SPACE:
            return CANNOT_CONTINUE
        return USER_ERROR if error.errno in NOT_USABLE else CRASHED
    return next((code for code, kind in ENDS.items() if isinstance(error, kind)), CRASHED)


def reason(error: Exception) -> str:
    """Return an error's message; for an operating system's error the file, what is wrong, and what to do."""
    if not isinstance(error, OSError):
        return str(error)
    remedy = "free some space; the same command resumes the run" if error.errno in NO_SPACE else "give another path"
    return f"{error.filename or 'a file'}: {error.strerror}: {remedy}"
