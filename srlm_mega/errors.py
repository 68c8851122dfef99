"""The ways a run ends early, and their exit codes."""

import errno

CRASHED, USER_ERROR, CANNOT_CONTINUE, STOP_REQUESTED, PAUSED = 1, 2, 3, 4, 5
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
NOT_USABLE = frozenset(
    {
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
    }
)


class UserError(ValueError):
    """A mistake in what the user gave: says what, what it got and what to do. Exit code 2."""


class CannotContinue(Exception):
    """The run cannot go on, and nothing is wrong with the software: says why and how to go on. Exit code 3."""


class StopRequested(Exception):
    """Somebody asked the run to stop: says where it stands. The same command goes on. Exit code 4."""


class TrainingPaused(Exception):
    """Training waits until its newest checkpoint is compared; the controller has that done, and starts it again."""


class StageCrashed(Exception):
    """A stage's process ended in a way it did not explain: shows the end of its log. Exit code 1."""


def exit_code(error: Exception) -> int:
    """The code a command ends with."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in NOT_USABLE):
        return USER_ERROR
    if isinstance(error, CannotContinue) or (isinstance(error, OSError) and error.errno in NO_SPACE):
        return CANNOT_CONTINUE
    if isinstance(error, TrainingPaused):
        return PAUSED
    return STOP_REQUESTED if isinstance(error, StopRequested) else CRASHED


def reason(error: Exception) -> str:
    """An error in words; of the system's, with the file and what to do."""
    if not isinstance(error, OSError):
        return str(error)
    remedy = "free some space, the same command goes on" if error.errno in NO_SPACE else "give another path"
    return f"{error.filename or 'a file'}: {error.strerror}: {remedy}"
