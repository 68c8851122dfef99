"""The sampler of both TensorRT-LLM backends: requests to its LLM API, and completions from it. Written for 1.2.

Never run on real hardware: TensorRT-LLM cannot be imported without a GPU. It was tested against a strict stand-in of
the documented API (tests/support/tensorrt_llm_stand_in); tests/gpu has the same tests for the real one.
"""

from collections.abc import Sequence

from tensorrt_llm import SamplingParams as TrtllmParams
from tensorrt_llm.llmapi import LLM, CompletionOutput

from srlm_mega.records import FinishReason
from srlm_mega.sampling.sampler import Completion, ModelLimits, SamplingParams
from srlm_mega.seeds import derive_seed


class TrtllmSampler:
    """A `Sampler` of a loaded `LLM`. The n completions of a prompt are one request, whose prompt is computed once; the
    beginning that successive prompts share is reused from the KV cache."""

    def __init__(self, llm: LLM, eos_id: int, limits: ModelLimits, logprobs: bool) -> None:
        self._llm = llm
        self._eos_id = eos_id
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
            end_id=self._eos_id,
            pad_id=self._eos_id,
            logprobs=self._logprobs,
            detokenize=False,
            add_special_tokens=False,
        )

    def _completion(self, output: CompletionOutput, params: SamplingParams, seed: int) -> Completion:
        """Convert an answer. RuntimeError for one that broke off (`timeout`, `cancelled`): a retry may succeed."""
        tokens = tuple(output.token_ids)
        # The end token itself is left out of the answer by some versions and kept by others.
        if output.finish_reason == "stop" and tokens[-1:] != (self._eos_id,):
            tokens = (*tokens, self._eos_id)
        reason = self._finish_reason(output, tokens, params)
        # TensorRT-LLM's stop words need its tokenizer and a single tokenisation; a stop string has several.
        cut = None if params.stop is None else params.stop.cut(tokens)
        if cut is not None:
            return Completion(cut, "stop", seed)
        logprob = output.cumulative_logprob  # kept to 1e-4 nats: further digits are rounding of the arithmetic
        return Completion(tokens, reason, seed, None if logprob is None else round(logprob, 4))

    def _finish_reason(self, output: CompletionOutput, tokens: Sequence[int], params: SamplingParams) -> FinishReason:
        match output.finish_reason:
            case "stop":
                return "stop"
            case "length":
                assert len(tokens) == params.max_new_tokens, (
                    f"{len(tokens)} tokens, yet it ended at max_tokens={params.max_new_tokens}"
                )
                return "length"
            case other:
                raise RuntimeError(f"TensorRT-LLM ended a request with {other!r}")
