"""STAND-IN: the ways in which it fails on demand (see the package)."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Failures:
    """None, where nothing is to fail."""

    refused_token: int | None = None
    cancelled_token: int | None = None
    dies_after: int | None = None
    hangs_after: int | None = None
    slow_start: float = 0.0

    @classmethod
    def of_environment(cls) -> "Failures":
        """Read STAND_IN_*; where another process has failed already, this one does not."""
        number = {
            name: int(os.environ[f"STAND_IN_{name.upper()}"])
            for name in ("refused_token", "cancelled_token", "dies_after", "hangs_after")
            if f"STAND_IN_{name.upper()}" in os.environ
        }
        if number.keys() & {"dies_after", "hangs_after"} and not first_to_fail():
            number = {name: value for name, value in number.items() if name.endswith("token")}
        return cls(**number, slow_start=float(os.environ.get("STAND_IN_SLOW_START", 0)))


def first_to_fail() -> bool:
    """Whether this is the process that is to fail, of all that have the same file."""
    file = os.environ.get("STAND_IN_FAILS_ONCE")
    try:
        if file is not None:
            Path(file).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
