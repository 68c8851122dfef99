"""The sampler of both TensorRT-LLM backends: requests to its LLM API, and completions from it. Written for 1.2.

Never run on real hardware: TensorRT-LLM cannot be imported without a GPU. It was tested against a strict stand-in of
the documented API (tests/support/tensorrt_llm_stand_in); tests/gpu has the same tests for the real one.
"""

from collections.abc import Iterator, Sequence

from tensorrt_llm import SamplingParams as TrtllmParams
from tensorrt_llm.llmapi import LLM, CompletionOutput

from srlm_mega.sampling.sampler import Answer, Completion, ModelLimits, Request, SamplingParams
from srlm_mega.seeds import derive_seed


class TrtllmSampler:
    """A `Sampler` of a loaded `LLM`. The n completions of a prompt are one request, whose prompt is computed once; the
    beginning that successive prompts share is reused from the KV cache."""

    def __init__(self, llm: LLM, end_ids: tuple[int, ...], limits: ModelLimits, logprobs: bool) -> None:
        self._llm = llm
        self._end_ids = end_ids
        self._limits = limits
        self._logprobs = 1 if logprobs else None

    def sample(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, first: int = 0
    ) -> list[list[Completion]]:
        """Sample completions as `Sampler.sample` specifies."""
        self._limits.check(prompts, params.max_new_tokens)
        seeds = [derive_seed(params.seed, position) for position in range(first, first + len(prompts))]
        outputs = self._llm.generate(
            [list(prompt) for prompt in prompts],
            [self._request(params, seed) for seed in seeds],
            use_tqdm=False,
        )
        assert len(outputs) == len(prompts), f"{len(prompts)} requests, {len(outputs)} answers"
        # TensorRT-LLM samples completion i of a request with the request's seed + i.
        return [
            [self._completion(one, params, seed + copy) for copy, one in enumerate(output.outputs)]
            for output, seed in zip(outputs, seeds, strict=True)
        ]

    def stream(self, requests: Iterator[Request]) -> Iterator[Answer]:
        """Yield answers as `Sampler.stream` specifies, one request after the other."""
        for request in requests:
            (completions,) = self.sample([request.prompt], request.params, request.position)
            yield Answer(request, tuple(completions))

    def close(self) -> None:
        """Shut down the workers, which frees their memory."""
        self._llm.shutdown()

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
            logprobs=self._logprobs,
            detokenize=False,
            add_special_tokens=False,
        )

    def _completion(self, output: CompletionOutput, params: SamplingParams, seed: int) -> Completion:
        """Convert an answer. RuntimeError for one that broke off (`timeout`, `cancelled`): a retry may succeed."""
        reason, tokens = output.finish_reason, tuple(output.token_ids)
        # Of a request's n sequences only the one that ends last is given a reason, and the others keep a stop token.
        if reason not in ("stop", "length", None):
            raise RuntimeError(f"TensorRT-LLM ended a request with {reason!r}")
        full = len(tokens) == params.max_new_tokens
        assert full or reason != "length", f"{len(tokens)} tokens, yet it ended at max_tokens={params.max_new_tokens}"
        has_end = bool(tokens) and tokens[-1] in self._end_ids
        if not has_end and (reason == "stop" or not full):  # the end token is left out
            tokens = (*tokens, self._end_ids[0] if output.stop_reason is None else output.stop_reason)
        # TensorRT-LLM's stop words need its tokenizer and a single tokenisation; a stop string has several.
        cut = None if params.stop is None else params.stop.cut(tokens)
        if cut is not None:
            return Completion(cut, "stop", seed)
        logprob = output.cumulative_logprob  # kept to 1e-4 nats: further digits are rounding of the arithmetic
        ended = tokens[-1] in self._end_ids
        return Completion(tokens, "stop" if ended else "length", seed, None if logprob is None else round(logprob, 4))
