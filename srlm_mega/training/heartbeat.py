"""A watchdog: when a phase of training exceeds its timeout, it says which ranks did not arrive.

Every rank counts its beats, one for each place in the code that all ranks pass in the same order. Once a second a
thread publishes the newest in the store of the ranks' rendezvous. The others wait for a rank whose count is behind
theirs, or whose thread no longer publishes (a stopped process, a lost machine). A second thread, which never uses the
store, notices when the first one waits for it without end: a call over a connection that was cut has no timeout.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

import orjson
from torch.distributed import DistError, Store

from srlm_mega.errors import CRASHED

Phase = Literal["start", "step", "checkpoint", "export"]
STORE_TIMEOUT = timedelta(seconds=10)
PATIENCE_SECONDS = 25.0  # more than the store's timeout and the time to report who is missing
STUCK = "heartbeat/stuck"


@dataclass(frozen=True)
class Beat:
    """A rank's newest place in the code; `count` counts its places, `ticks` how often its thread has published."""

    name: str
    count: int
    place: str
    ticks: int = 0


class Heartbeat:
    """One rank's watchdog. `timeouts` are seconds by phase; `stuck` is called, on one rank, with who did not arrive."""

    def __init__(
        self,
        store: Store,
        rank: int,
        names: Sequence[str],
        timeouts: Mapping[Phase, float],
        stuck: Callable[[str], None],
        interval: float = 1.0,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._store, self._rank, self._names, self._timeouts = store.clone(), rank, names, timeouts
        self._stuck, self._interval, self._patience = stuck, interval, patience
        self._store.set_timeout(STORE_TIMEOUT)
        self._ticks = 0
        self._ended = threading.Event()
        self._asking_since: float | None = None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._guard)]
        self._newest = (Beat(names[rank], 0, "start"), time.monotonic(), timeouts["start"])
        self._publish()
        for thread in self._threads:
            thread.start()

    def beat(self, phase: Phase, place: str) -> None:
        """Record that this rank has reached `place`; the phase's time starts now."""
        count = self._newest[0].count + 1
        self._newest = (Beat(self._names[self._rank], count, place), time.monotonic(), self._timeouts[phase])

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        for thread in self._threads:
            thread.join(self._patience)

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self._asking_since = time.monotonic()
            reason = self._overdue()
            try:
                self._publish()
                if reason or self._store.check([STUCK]):
                    self._give_up(reason)
            except DistError as error:
                if reason:
                    self._leave(f"{reason}, and the store of the ranks does not answer: {error}")
            self._asking_since = None

    def _guard(self) -> None:
        while not self._ended.wait(self._interval):
            since, reason = self._asking_since, self._overdue()
            if since is not None and time.monotonic() - since > self._patience and reason:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                self._leave(f"{reason}, and the store of the ranks does not answer")

    def _overdue(self) -> str:
        """Return why this rank is too late; empty when it is not."""
        beat, since, timeout = self._newest
        return f"{beat.place} takes longer than {timeout / 60:g} min" if time.monotonic() - since > timeout else ""

    def _publish(self) -> None:
        self._ticks += 1
        self._store.set(key(self._rank), orjson.dumps(replace(self._newest[0], ticks=self._ticks)))

    def _give_up(self, reason: str) -> None:
        """Show this rank's stacks and end it; the first rank that gets here reports who did not arrive."""
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        is_first = self._store.add(STUCK, 1) == 1
        earlier = self._beats() if is_first else []
        for _ in range(3 if is_first else 9):  # the first one reports before another's end takes it down
            time.sleep(self._interval)
            self._publish()
        if is_first:
            self._leave(f"{reason}. {absent(self._names, earlier, self._beats())}")
        os._exit(CRASHED)

    def _leave(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)
        self._stuck(message)
        os._exit(CRASHED)

    def _beats(self) -> list[Beat | None]:
        known = [self._store.check([key(rank)]) for rank in range(len(self._names))]
        return [Beat(**orjson.loads(self._store.get(key(rank)))) if there else None for rank, there in enumerate(known)]


def key(rank: int) -> str:
    """Return the store's key of a rank's newest beat."""
    return f"heartbeat/{rank}"


def absent(names: Sequence[str], earlier: Sequence[Beat | None], later: Sequence[Beat | None]) -> str:
    """Return who did not arrive, from the newest beat of every rank at two times."""
    furthest = max((beat.count for beat in later if beat is not None), default=0)
    missing = []
    for name, before, beat in zip(names, earlier, later, strict=True):
        if beat is None:
            missing.append(f"{name}, never heard of")
        elif before is not None and before.ticks == beat.ticks:
            missing.append(f"{name}, last heard of in {beat.place}, not answering")
        elif beat.count < furthest:
            missing.append(f"{name}, still in {beat.place}")
    if not missing:
        return "All ranks are at this place: their stacks are in the log"
    return "Did not arrive: " + "; ".join(missing)
