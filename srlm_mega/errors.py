"""The ways a run ends early, and their exit codes."""

CRASHED, USER_ERROR, STOPPED = 1, 2, 3


class UserError(ValueError):
    """A mistake in what the user gave: says what, what it got and what to do. Exit code 2."""


class RunStopped(Exception):
    """The run cannot go on, and nothing is wrong with the software: says why and how to go on. Exit code 3."""


class StageCrashed(Exception):
    """A stage's process ended in a way it did not explain: shows the end of its log. Exit code 1."""
