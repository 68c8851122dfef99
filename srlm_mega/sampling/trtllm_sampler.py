"""The sampler of both TensorRT-LLM backends: requests to its LLM API, and completions from it. Written for 1.2 to 1.4.

Never run on real hardware: TensorRT-LLM cannot be imported without a GPU. It was tested against a strict stand-in of
the documented API (tests/support/tensorrt_llm_stand_in); tests/gpu has the same tests for the real one.
"""

import asyncio
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from threading import Thread

from tensorrt_llm import SamplingParams as TrtllmParams
from tensorrt_llm.llmapi import LLM, CompletionOutput, RequestError, RequestOutput

from srlm_mega.sampling.sampler import Answer, Completion, EngineDied, ModelLimits, Request, SamplingParams
from srlm_mega.seeds import derive_seed

SILENCE = 5.0  # seconds without an answer after which the executor is asked whether it lives
ONE_TOKEN = SamplingParams(n=1, temperature=0.0, top_p=1.0, max_new_tokens=1, seed=0)


class TrtllmSampler:
    """A `Sampler` of a loaded `LLM`. The n completions of a prompt are one request, whose prompt is computed once; the
    beginning that successive prompts share is reused from the KV cache. Never run on real hardware.

    `untempered` says whether the LLM's log-probabilities are the model's own. Those of TorchSampler are (its
    LogprobMode.RAW); the C++ sampler of 1.2 divides the logits by the temperature before it takes them, so there is no
    cumulative_logprob.
    """

    def __init__(
        self, llm: LLM, end_ids: tuple[int, ...], limits: ModelLimits, max_batch_size: int, untempered: bool
    ) -> None:
        self._llm = llm
        self._end_ids = end_ids
        self._limits = limits
        self._untempered = untempered
        # Of a request's n sequences half are done, on average, long before the last: as many again keep the batch full.
        self._sequences_in_flight = 2 * max_batch_size
        # An LLM's answers are awaited in an event loop that always runs: one that stands still misses their arrival.
        self._loop = asyncio.new_event_loop()
        Thread(target=run_until_stopped, args=(self._loop,), name="TensorRT-LLM's answers", daemon=True).start()

    def sample(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, first: int = 0
    ) -> list[list[Completion]]:
        """Sample completions as `Sampler.sample` specifies. EngineDied when the executor is gone."""
        self._limits.check(prompts, params.max_new_tokens)
        seeds = [derive_seed(params.seed, position) for position in range(first, first + len(prompts))]
        if not prompts:
            return []
        self._wait_for_aborts()
        try:
            outputs = self._llm.generate(
                [list(prompt) for prompt in prompts],
                [self._request(params, seed) for seed in seeds],
                use_tqdm=False,
            )
        except Exception as error:
            self._check_alive(error)
            raise
        assert len(outputs) == len(prompts), f"{len(prompts)} requests, {len(outputs)} answers"
        if broken_off := [reason for output in outputs if (reason := why_broken_off(output))]:
            raise RuntimeError(broken_off[0])
        return [list(self._completions(output, params, seed)) for output, seed in zip(outputs, seeds, strict=True)]

    def stream(self, requests: Iterator[Request]) -> Iterator[Answer]:
        """Yield answers as `Sampler.stream` specifies. EngineDied when the executor is gone, at the latest after
        `SILENCE` seconds without an answer."""
        tasks: set[asyncio.Task[Answer]] = set()
        arrived: SimpleQueue[Answer | BaseException] = SimpleQueue()
        in_flight, more = 0, True
        try:
            while True:
                while more and in_flight < self._sequences_in_flight:
                    request = next(requests, None)
                    if request is None:
                        more = False
                    else:
                        self._limits.check([request.prompt], request.params.max_new_tokens)
                        self._loop.call_soon_threadsafe(self._send, request, tasks, arrived)
                        in_flight += request.params.n
                if in_flight == 0:
                    return
                answer = self._next(arrived)
                in_flight -= answer.request.params.n
                yield answer
        finally:
            if in_flight:
                self._loop.call_soon_threadsafe(cancel, tasks)

    def close(self) -> None:
        """Shut down the workers, which frees their memory."""
        self._wait_for_aborts()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._llm.shutdown()

    def _wait_for_aborts(self) -> None:
        """Let the loop send what a stream that was left has to abort; it does so in one turn, and sleeps the next."""
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result()

    def _send(
        self, request: Request, tasks: set[asyncio.Task[Answer]], arrived: SimpleQueue[Answer | BaseException]
    ) -> None:
        """Ask for a request, in the loop's thread: the sockets to the executor serve one thread at a time."""
        task = self._loop.create_task(self._answer(request))
        tasks.add(task)

        def hand_over(done: asyncio.Task[Answer]) -> None:
            tasks.discard(done)
            if not done.cancelled():
                arrived.put(done.exception() or done.result())

        task.add_done_callback(hand_over)

    async def _answer(self, request: Request) -> Answer:
        """Ask for a request and wait for its answer; an answer with `error` where only this request failed."""
        seed = derive_seed(request.params.seed, request.position)
        try:
            output = self._llm.generate_async(list(request.prompt), self._request(request.params, seed))
            try:
                await output.aresult()
            except asyncio.CancelledError:
                output.abort()
                raise
        except Exception as error:
            self._check_alive(error)
            return Answer(request, error=f"TensorRT-LLM: {error}")
        if broken_off := why_broken_off(output):
            return Answer(request, error=broken_off)
        return Answer(request, self._completions(output, request.params, seed))

    def _next(self, arrived: "SimpleQueue[Answer | BaseException]") -> Answer:
        """Return the answer that arrives first; raise what a task ended by instead."""
        while True:
            try:
                answer = arrived.get(timeout=SILENCE)
            except Empty:
                # 1.2 leaves requests without an answer when its workers die, and tells whoever asks next.
                asyncio.run_coroutine_threadsafe(self._ask(), self._loop).result()
                continue
            if isinstance(answer, BaseException):
                raise answer
            return answer

    async def _ask(self) -> None:
        self._check_alive(None)

    def _check_alive(self, cause: Exception | None) -> None:
        """Ask for a token. EngineDied, with what it answered before, where not even that can be asked: an executor
        that died refuses everything for ever. An error of one request leaves it alone."""
        if isinstance(cause, RequestError | ValueError):
            return
        try:
            self._llm.generate_async([self._end_ids[0]], self._request(ONE_TOKEN, 0))
        except Exception as error:
            raise EngineDied(f"TensorRT-LLM's executor is gone: {cause or error}") from error

    def _request(self, params: SamplingParams, seed: int) -> TrtllmParams:
        # Greedy decoding is asked for by top_k: with all three left out, the decoding depends on the version.
        greedy = params.temperature == 0
        return TrtllmParams(
            n=params.n,
            max_tokens=params.max_new_tokens,
            temperature=None if greedy else params.temperature,
            top_p=None if greedy else params.top_p,
            top_k=1 if greedy else None,
            seed=seed,
            end_id=self._end_ids[0],
            pad_id=self._end_ids[0],
            stop_token_ids=list(self._end_ids[1:]),
            logprobs=0 if params.logprobs and self._untempered else None,  # 0: of the sampled token alone
            detokenize=False,
            add_special_tokens=False,
        )

    def _completions(self, output: RequestOutput, params: SamplingParams, seed: int) -> tuple[Completion, ...]:
        # TensorRT-LLM samples completion i of a request with the request's seed + i.
        return tuple(self._completion(one, params, seed + copy) for copy, one in enumerate(output.outputs))

    def _completion(self, output: CompletionOutput, params: SamplingParams, seed: int) -> Completion:
        reason, tokens = output.finish_reason, tuple(output.token_ids)
        # Of a request's n sequences only the one that ends last is given a reason, and the others keep a stop token.
        full = len(tokens) == params.max_new_tokens
        assert full or reason != "length", f"{len(tokens)} tokens, yet it ended at max_tokens={params.max_new_tokens}"
        has_end = bool(tokens) and tokens[-1] in self._end_ids
        if not has_end and (reason == "stop" or not full):  # the end token is left out
            tokens = (*tokens, self._end_ids[0] if output.stop_reason is None else output.stop_reason)
        # TensorRT-LLM's stop words need its tokenizer and a single tokenisation; a stop string has several.
        cut = None if params.stop is None else params.stop.cut(tokens)
        ended = cut is not None or tokens[-1] in self._end_ids
        tokens = tokens if cut is None else cut
        return Completion(tokens, "stop" if ended else "length", seed, cumulative_logprob(output, tokens))


def run_until_stopped(loop: asyncio.AbstractEventLoop) -> None:
    """Run an event loop in this thread, and close it when it is stopped."""
    loop.run_forever()
    loop.close()


def cumulative_logprob(output: CompletionOutput, tokens: tuple[int, ...]) -> float | None:
    """Return the sum of these tokens' log-probabilities, in nats; None where the answer lacks some of them, as it may
    that of an end token that it leaves out."""
    if len(output.logprobs or ()) < len(tokens):
        return None
    total: float = sum(entry[token].logprob for token, entry in zip(tokens, output.logprobs, strict=False))
    return round(total, 4)  # further digits are rounding of the arithmetic


def why_broken_off(output: RequestOutput) -> str:
    """Return why a request has no whole answer (`timeout`, `cancelled`); empty where it has one."""
    reasons = [one.finish_reason for one in output.outputs if one.finish_reason not in ("stop", "length", None)]
    return f"TensorRT-LLM ended a request with {reasons[0]!r}" if reasons else ""


def cancel(tasks: set[asyncio.Task[Answer]]) -> None:
    """Cancel what is left, in the loop's thread."""
    for task in tasks:
        task.cancel()
