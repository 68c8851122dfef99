"""The two ways a run ends early on purpose, and their exit codes. Everything else is a bug and shows a traceback."""

USER_ERROR, STOPPED = 2, 3


class UserError(ValueError):
    """A mistake in what the user gave: says what, what it got and what to do. Exit code 2."""


class RunStopped(Exception):
    """The run cannot go on, and nothing is wrong with the software: says why and how to go on. Exit code 3."""
