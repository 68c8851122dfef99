"""A model of an engine with continuous batching: which sequences it computes together, and how long that takes.

Between two events (a sequence ends, the cache is full) each step gives a token to each sequence, so the model jumps
from event to event. Steps and prefills take the seconds of a `Replica`; a prefill holds up decoding (no chunks).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from math import ceil, exp, inf, log
from random import Random
from statistics import NormalDist
from typing import Literal

from srlm_mega.tools.planner.generation import Replica

SchedulerPolicy = Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"]
NORMAL = NormalDist()
BISECTIONS = 50
MODELLED = 20_000  # sequences; of more, the others go at the pace of the full engine


@dataclass(frozen=True)
class OutputLengths:
    """Lengths of outputs in tokens: lognormal and cut off at `cap`. `mean` is that of what is left after the cut, and
    `spread` the standard deviation of the logarithm before it; 0 makes all of them equal."""

    mean: float
    cap: int
    spread: float

    def quantile(self, share: float) -> int:
        """Return the length that this share of all outputs, more than 0 and less than 1, does not exceed."""
        return max(1, min(self.cap, round(exp(self._location + self.spread * NORMAL.inv_cdf(share)))))

    def evenly(self, count: int, seed: int) -> list[int]:
        """Return `count` lengths that are spread over the distribution as evenly as can be, in random order."""
        lengths = [self.quantile((place + 0.5) / count) for place in range(count)]
        Random(seed).shuffle(lengths)
        return lengths

    @cached_property
    def _location(self) -> float:
        """The mean of the logarithm before the cut, by bisection."""
        low, high = log(min(self.mean, self.cap)) - self.spread**2 / 2, log(self.cap) + 10 * self.spread
        for _ in range(BISECTIONS if self.spread else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean_at(middle) < self.mean else (low, middle)
        return low

    def _mean_at(self, location: float) -> float:
        cut = (log(self.cap) - location) / self.spread
        below = exp(location + self.spread**2 / 2) * NORMAL.cdf(cut - self.spread)
        return below + self.cap * NORMAL.cdf(-cut)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A prompt and the copies that continue it, all lengths in tokens: what each copy's output will have, which the
    engine does not know beforehand, and what it may have at most."""

    key: int
    prompt: int
    outputs: Sequence[int]
    max_tokens: int


@dataclass(slots=True)
class _Copy:
    """A sequence. `left` tokens of its output are still to be sampled, as of its last admission."""

    request: EngineRequest
    output: int
    left: int

    @property
    def context(self) -> int:
        return self.request.prompt + self.output - self.left


class EngineModel:
    """One replica's engine, driven from outside: `submit` requests, `advance` to the next event.

    - policy: a sequence is admitted when the cache has room for its prompt and max_tokens (GUARANTEED_NO_EVICT), or for
      what is in use (MAX_UTILIZATION): when it is full, the last one admitted waits, and is computed again.
    - now: seconds, at first when the engine has loaded.

    Copies of a prompt share its prefill, not its cache.
    """

    def __init__(self, replica: Replica, policy: SchedulerPolicy, now: float = 0.0) -> None:
        self.now = now
        self.sampled = 0  # tokens
        self.pauses = 0
        self._replica = replica
        self._reserves = policy == "GUARANTEED_NO_EVICT"
        self._waiting: deque[_Copy] = deque()
        self._running: list[tuple[int, int, _Copy]] = []  # a heap of the step of the end, the admission, the sequence
        self._step = 0
        self._admissions = 0
        self._reserved = 0  # tokens of the cache
        self._context = 0  # tokens of all running sequences
        self._unfinished: dict[int, int] = {}  # copies of each request, by its key
        self._prefilled: set[int] = set()

    @property
    def batch_limit(self) -> int:
        """Number of sequences that may run together."""
        return self._replica.batch_limit

    @property
    def waiting(self) -> int:
        """Number of sequences that wait for room."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """True until all that was submitted is whole."""
        return bool(self._unfinished)

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. ValueError for one that the cache cannot hold alone."""
        need = request.prompt + (request.max_tokens if self._reserves else max(request.outputs))
        if need > self._replica.cache_tokens:
            raise ValueError(f"a sequence of {need} tokens, and the cache holds {self._replica.cache_tokens:.0f}")
        self._unfinished[request.key] = len(request.outputs)
        self._waiting.extend(_Copy(request, length, length) for length in request.outputs)

    def advance(self, until: float = inf) -> list[EngineRequest]:
        """Go on to the next event, or to the first step that ends at `until` or later, and return the requests that are
        whole then; an idle engine goes on to `until`."""
        self._admit()
        if not self._running:
            self.now = max(self.now, until)
            return []
        self._decode(until)
        whole = []
        while self._running and self._running[0][0] == self._step:
            *_, copy = heappop(self._running)
            request = copy.request
            self._reserved -= request.prompt + request.max_tokens
            self._context -= request.prompt + copy.output
            self._unfinished[request.key] -= 1
            if not self._unfinished[request.key]:
                del self._unfinished[request.key]
                self._prefilled.remove(request.key)
                whole.append(request)
        return whole

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._replica.batch_limit and self._has_room(self._waiting[0]):
            copy = self._waiting.popleft()
            request = copy.request
            if request.key not in self._prefilled or copy.left < copy.output:
                self.now += self._replica.prefill_seconds(copy.context)
                self._prefilled.add(request.key)
            self._reserved += request.prompt + request.max_tokens
            self._context += copy.context
            self._admissions += 1
            heappush(self._running, (self._step + copy.left, self._admissions, copy))

    def _has_room(self, copy: _Copy) -> bool:
        if self._reserves:
            return self._reserved + copy.request.prompt + copy.request.max_tokens <= self._replica.cache_tokens
        return self._context + copy.context + len(self._running) + 1 <= self._replica.cache_tokens

    def _decode(self, until: float) -> None:
        """Take steps until something happens."""
        while not self._reserves and self._context + len(self._running) > self._replica.cache_tokens:
            self._pause()
        batch = len(self._running)
        steps = self._running[0][0] - self._step
        if not self._reserves:
            steps = min(steps, int(self._replica.cache_tokens - self._context) // batch)
        if until < inf:
            one = self._replica.decode_seconds(batch, self._context / batch)
            steps = max(1, min(steps, ceil((until - self.now) / one)))
        self.now += steps * self._replica.decode_seconds(batch, self._context / batch + (steps - 1) / 2)
        self._step += steps
        self._context += steps * batch
        self.sampled += steps * batch

    def _pause(self) -> None:
        """Let the sequence that was admitted last wait again; it comes next."""
        last = max(self._running, key=lambda entry: entry[1])
        self._running.remove(last)
        heapify(self._running)
        end, _, copy = last
        copy.left = end - self._step
        self._context -= copy.context
        self._reserved -= copy.request.prompt + copy.request.max_tokens
        self._waiting.appendleft(copy)
        self.pauses += 1


def share_seconds(
    replica: Replica, policy: SchedulerPolicy, count: int, prompt: int, samples: int, lengths: OutputLengths
) -> float:
    """Return the seconds of a replica for `count` requests of `samples` copies, all queued at once, from the first
    prefill to the end of the last straggler; inf when not even one sequence fits."""
    if prompt + lengths.cap > replica.cache_tokens:
        return inf
    modelled = min(count, ceil(MODELLED / samples))
    outputs = lengths.evenly(modelled * samples, seed=0)
    engine, pace = EngineModel(replica, policy), 0.0
    for key in range(modelled):
        engine.submit(EngineRequest(key, prompt, outputs[key * samples : (key + 1) * samples], lengths.cap))
    while engine.busy:
        engine.advance()
        if engine.waiting or not pace:
            pace = engine.sampled / engine.now
    return engine.now + (count - modelled) * samples * lengths.mean / pace
