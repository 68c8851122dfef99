"""STAND-IN of `tensorrt_llm.executor`: requests, their answers, and the thread that answers them."""

import asyncio
import itertools
import random
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from tensorrt_llm.failures import Failures
from tensorrt_llm.form import OLD
from tensorrt_llm.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "timeout", "cancelled"]


class RequestError(RuntimeError):
    """The error of one request."""


class EngineDeadError(RuntimeError):
    """1.4's: the executor is gone."""


@dataclass(slots=True)
class Logprob:
    """A token's log-probability, and its place among the tokens."""

    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class RequestOutput:
    """A request, and its answer when there is one. Made inside an event loop it is awaited, outside it is waited for:
    the two do not mix."""

    def __init__(self, executor: "Executor", request_id: int, ids: list[int], params: SamplingParams) -> None:
        self.request_id = request_id
        self.prompt_token_ids = ids
        self.prompt: str | None = None
        self.sampling_params = params
        self.outputs = [CompletionOutput(index) for index in range(params.n)]
        self.answered: Future[list[CompletionOutput]] = Future()
        self._executor = executor
        self._aborted = False
        self._in_loop = has_event_loop()

    def result(self, timeout: float | None = None) -> "RequestOutput":
        """Wait for the answer. As in the real one, `timeout` is not looked at."""
        assert not self._in_loop, "made inside an event loop: await it"
        self.outputs = self.answered.result()
        return self

    async def aresult(self) -> "RequestOutput":
        """Wait for the answer without blocking the event loop."""
        assert self._in_loop, "The asyncio event loop was not present during initialization"
        self.outputs = await asyncio.shield(asyncio.wrap_future(self.answered))
        return self

    def __await__(self) -> Generator[Any, None, "RequestOutput"]:
        return self.aresult().__await__()

    @property
    def finished(self) -> bool:
        """Whether there is an answer."""
        return self.answered.done()

    def abort(self) -> None:
        """Ask the executor to drop the request: it ends as `cancelled`, a while later."""
        self._aborted = True
        self._executor.cancel()

    def aborted(self) -> bool:
        """Whether it was dropped."""
        return self._aborted


class Executor:
    """Answers requests in a thread of its own, and fails as it is told to."""

    def __init__(self, answer: Callable[[list[int], SamplingParams], list[CompletionOutput]], failures: Failures):
        self.doing_shutdown = False
        self._answer = answer
        self._failures = failures
        self._request_ids = itertools.count()
        self._requests: list[RequestOutput] = []
        self._changed = threading.Condition()
        self._error: Exception | None = None  # of the processes, for whoever asks next
        threading.Thread(target=self._work, daemon=True, name="stand-in executor").start()

    def submit(self, ids: list[int], params: SamplingParams) -> RequestOutput:
        """Take a request. RuntimeError for ever after the executor died."""
        with self._changed:
            if self._error is not None:
                self.doing_shutdown = OLD  # then the LLM itself refuses
                raise self._error
            output = RequestOutput(self, next(self._request_ids), ids, params)
            self._requests.append(output)
            self._changed.notify()
            return output

    def cancel(self) -> None:
        """Have an aborted request answered. OSError where there are no sockets any more."""
        if self.doing_shutdown or self._error is not None:
            raise OSError("Socket operation on non-socket")

    def shutdown(self) -> None:
        """End the thread."""
        with self._changed:
            self.doing_shutdown = True
            self._changed.notify()

    def _work(self) -> None:
        order, done = random.Random(0), 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._requests or self.doing_shutdown)
                if self.doing_shutdown:
                    return
                if done == self._failures.hangs_after:
                    self._changed.wait_for(lambda: self.doing_shutdown)
                    return
                if done == self._failures.dies_after:
                    return self._die()
                output = self._requests.pop(order.randrange(len(self._requests)))
            self._respond(output)
            done += 1

    def _die(self) -> None:
        self._error = RuntimeError("MPI worker 0 ended") if OLD else EngineDeadError("Engine has died")
        for output in () if OLD else self._requests:
            output.answered.set_exception(self._error)

    def _respond(self, output: RequestOutput) -> None:
        if self._failures.refused_token in output.prompt_token_ids:
            output.answered.set_exception(RequestError("the runtime refused this request"))
            return
        if output.aborted() or self._failures.cancelled_token in output.prompt_token_ids:
            answer = [CompletionOutput(index, finish_reason="cancelled") for index in range(output.sampling_params.n)]
        else:
            try:
                answer = self._answer(output.prompt_token_ids, output.sampling_params)
            except RequestError as error:
                output.answered.set_exception(error)
                return
        output.answered.set_result(answer)


def has_event_loop() -> bool:
    """Whether this is called inside a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
