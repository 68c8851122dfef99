"""Modelled engines in virtual time: the real code of replicas runs on them in threads, and hours take a second."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush
from random import Random
from threading import Event

from srlm_mega.sampling.sampler import Answer, Completion, Request, SamplingParams
from srlm_mega.seeds import derive_seed
from srlm_mega.tools.planner.engine_model import EngineModel, EngineRequest, OutputLengths


class VirtualClock:
    """The time of several threads, of which one runs at a time: when it waits, the one whose waiting ends first is
    next. Everything happens in the same order each time. `now` is in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._waiting: list[tuple[float, int, Event]] = []
        self._turns = 0
        self._failed = False

    def run(self, works: Sequence[Callable[[], None]]) -> None:
        """Run each piece of work in a thread of its own, and return when all are done. An error of one ends all."""
        starts = [self._queue(self.now) for _ in works]
        with ThreadPoolExecutor(len(works)) as pool:
            done = [pool.submit(self._take_part, *each) for each in zip(works, starts, strict=True)]
            self._hand_over()
        for each in done:
            each.result()

    def sleep(self, seconds: float) -> None:
        """Wait for so many seconds."""
        self.wait_until(self.now + seconds)

    def wait_until(self, time: float) -> None:
        """Let others run until `time`, at least those whose waiting has ended."""
        turn = self._queue(max(time, self.now))
        self._hand_over()
        self._wait(turn)

    def _queue(self, time: float) -> Event:
        turn = Event()
        heappush(self._waiting, (time, self._turns, turn))
        self._turns += 1
        return turn

    def _hand_over(self) -> None:
        if self._waiting:
            self.now, _, turn = heappop(self._waiting)
            turn.set()

    def _wait(self, turn: Event) -> None:
        turn.wait()
        if self._failed:
            raise RuntimeError("another thread of this clock failed")

    def _take_part(self, work: Callable[[], None], turn: Event) -> None:
        try:
            self._wait(turn)
            work()
        except BaseException:
            self._failed = True
            raise
        finally:
            self._hand_over()


class ModelledSampler:
    """A `Sampler` whose engine is modelled and whose time is a clock's. Completions have no content but a length, which
    follows from their seed.

    `lengths`: of outputs, by their max_new_tokens. As of a real engine only whole requests are heard of, so that the
    copies of a request count until the last one ends: of `batches` times the sequences that run together, submitted at
    once, about half have ended.
    """

    def __init__(
        self, engine: EngineModel, clock: VirtualClock, lengths: Mapping[int, OutputLengths], batches: float = 2.0
    ) -> None:
        self.engine = engine
        self._clock = clock
        self._lengths = lengths
        self._in_flight = int(batches * engine.batch_limit)
        self._submitted = 0

    def stream(self, requests: Iterator[Request]) -> Iterator[Answer]:
        """Yield answers as `Sampler.stream` specifies."""
        taken: dict[int, Request] = {}
        held, exhausted = 0, False
        self._clock.wait_until(self.engine.now)
        while True:
            whole = self._catch_up()
            while not exhausted and held < self._in_flight:
                request = next(requests, None)
                whole += self._catch_up()  # the iterator may have waited
                if request is None:
                    exhausted = True
                else:
                    held += request.params.n
                    self._submitted += 1
                    taken[self._submitted] = request
                    self.engine.submit(self._modelled(request, self._submitted))
            if not taken:
                return
            while not whole:
                whole = self.engine.advance()
            self._clock.wait_until(self.engine.now)
            for one in whole:
                request = taken.pop(one.key)
                held -= request.params.n
                yield Answer(request, completions(request, one))

    def sample(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, first: int = 0
    ) -> list[list[Completion]]:
        """Sample completions as `Sampler.sample` specifies."""
        requests = [Request(prompt, params, position) for position, prompt in enumerate(prompts, first)]
        answers = {answer.request.position: answer.completions for answer in self.stream(iter(requests))}
        return [list(answers[request.position]) for request in requests]

    def close(self) -> None:
        """There is nothing to free."""

    def _catch_up(self) -> list[EngineRequest]:
        whole = []
        while self.engine.now < self._clock.now:
            whole += self.engine.advance(self._clock.now)
        return whole

    def _modelled(self, request: Request, key: int) -> EngineRequest:
        cap = request.params.max_new_tokens
        outputs = [self._lengths[cap].quantile(Random(seed).random() or 0.5) for seed in seeds_of(request)]
        return EngineRequest(key, len(request.prompt), outputs, cap)


def seeds_of(request: Request) -> list[int]:
    """Return the seeds of a request's completions."""
    params = request.params
    return [derive_seed(params.seed, request.position, copy) for copy in range(params.n)]


def completions(request: Request, one: EngineRequest) -> tuple[Completion, ...]:
    """Return what a request's copies have sampled: tokens without meaning, as many as the model says."""
    return tuple(
        Completion((0,) * output, "stop" if output < one.max_tokens else "length", seed)
        for output, seed in zip(one.outputs, seeds_of(request), strict=True)
    )
