"""A stand-in for an optimizer that shows which learning rates a scheduler sets."""

from typing import Any


class RecordedRates:
    """The one thing the scheduler wants of an optimizer: its parameter groups."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "weight_decay": 0.0, "wd_mult": 0.0}]
