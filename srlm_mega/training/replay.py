"""EFT replay: a share of a round's optimizer steps train on EFT examples, by SFT with the same optimizer.

Whole steps, not parts of a batch: the micro batches of a step then have one shape and one kind of loss, normalised by
one count, in every layout. The steps are spread evenly among DPO's, which keep their data, order and number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from srlm_mega.training.split import batch_order

T = TypeVar("T")
REPLAY_LOSS = "eft_replay/loss"  # the metric of a replayed step; `loss` stays the round's own


@dataclass(frozen=True)
class Turn(Generic[T]):
    """One optimizer step: its objective and items; `epoch` counts passes over that objective's data at its end."""

    objective: T
    indices: list[int]
    epoch: float
    replayed: bool


@dataclass(frozen=True)
class Turns(Generic[T]):
    """The steps of a training stage: `steps` of `main`, and among them `replayed` steps of `other`."""

    main: T
    num_items: int
    steps: int
    other: T | None = None
    num_others: int = 0
    replayed: int = 0

    @property
    def total(self) -> int:
        """Number of optimizer steps, replayed ones included."""
        return self.steps + self.replayed

    def __call__(self, batch_size: int, seed: int) -> Iterator[Turn[T]]:
        """Yield all steps in order; the first one is `main`'s."""
        order = batch_order(self.num_items, batch_size, seed)
        others = batch_order(self.num_others, batch_size, seed + 1) if self.other is not None else iter(())
        for number in range(1, self.total + 1):
            replays = number * self.replayed // self.total
            if self.other is not None and replays > (number - 1) * self.replayed // self.total:
                yield Turn(self.other, next(others), replays * batch_size / self.num_others, replayed=True)
            else:
                yield Turn(self.main, next(order), (number - replays) * batch_size / self.num_items, replayed=False)


def num_replayed(steps: int, share: float) -> int:
    """Return how many steps to add to `steps` for them to be `share` of all."""
    return round(steps * share / (1 - share))
