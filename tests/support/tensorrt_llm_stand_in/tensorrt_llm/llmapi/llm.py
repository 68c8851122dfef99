"""STAND-IN of `tensorrt_llm.llmapi.llm`: LLM of the PyTorch backend."""

import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tensorrt_llm.executor import CompletionOutput, Executor, FinishReason, Logprob, RequestError, RequestOutput
from tensorrt_llm.failures import Failures
from tensorrt_llm.form import OLD
from tensorrt_llm.llmapi.llm_args import BaseLlmArgs, TorchLlmArgs
from tensorrt_llm.sampling_params import SamplingParams

STOP_SHARE = 0.1


class LLM:
    """Its own are `keeps_end_token`, since both answers are seen in the wild, and `failures`."""

    args_class: ClassVar[type[BaseLlmArgs]] = TorchLlmArgs
    keeps_end_token = False
    failures: ClassVar[Failures | None] = None

    def __init__(self, model: str | Path, tokenizer: str | Path | None = None, **kwargs: Any) -> None:
        for key in kwargs:
            if key not in self.args_class.model_fields:
                raise ValueError(f"{type(self).__name__} got invalid argument: {key}")
        self.args = self.args_class(model=model, tokenizer=tokenizer, **kwargs)
        failures = self.failures or Failures.of_environment()
        time.sleep(failures.slow_start)
        config = json.loads((Path(model) / "config.json").read_text())
        config = config.get("pretrained_config", config)  # of an engine
        self._vocab_size = int(config["vocab_size"])
        if not self.args.skip_tokenizer_init:
            raise OSError(f"no tokenizer in {model}")
        self._max_seq_len = self.args.max_seq_len or int(config["max_position_embeddings"])
        self._max_input_len = self.args.max_input_len
        self._max_num_tokens = None if self.args.enable_chunked_prefill else self.args.max_num_tokens
        self._setup()
        self._executor: Executor = Executor(self._answer, failures)

    def _setup(self) -> None:
        self._torch_sampler = not OLD or self.args.model_dump()["sampler_type"] != "TRTLLMSampler"
        self._honours_seeds = not OLD or not self._torch_sampler

    def generate(
        self,
        inputs: Sequence[int] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> RequestOutput | list[RequestOutput]:
        """Ask for one prompt or several, then wait in their order: the first error ends it, and aborts nothing."""
        several = isinstance(inputs, list) and not isinstance(inputs[0], int)
        prompts: list[Any] = inputs if several else [inputs]  # type: ignore[assignment]
        outputs = [
            self.generate_async(ids, sampling_params[place] if isinstance(sampling_params, list) else sampling_params)
            for place, ids in enumerate(prompts)
        ]
        for output in outputs:
            output.result()
        return outputs if several else outputs[0]

    def generate_async(
        self, inputs: Sequence[int], sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> RequestOutput:
        """Ask for one prompt."""
        if self._executor.doing_shutdown:
            raise RuntimeError("LLM is shutting down")
        params = SamplingParams() if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"The sampling_params must be type SamplingParams or None, but got {type(params)}")
        if params.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None, or you can explicitly specify it")
        if params.stop is not None or params.bad is not None:
            raise RuntimeError("stop and bad strings are not processed by a tokenizer")
        if not isinstance(inputs, list) or not all(type(token) is int for token in inputs):
            raise TypeError(f"The inputs must be type str or list of int, but got {type(inputs)}")
        assert isinstance(inputs[0], int)
        if self._max_num_tokens is not None and len(inputs) > self._max_num_tokens:
            raise ValueError(f"The sum of prompt length ({len(inputs)}) should not exceed max_num_tokens")
        return self._executor.submit(inputs, params)

    def shutdown(self) -> None:
        """Free everything."""
        self._executor.shutdown()

    def _answer(self, ids: list[int], params: SamplingParams) -> list[CompletionOutput]:
        if len(ids) + params.max_tokens > self._max_seq_len:
            raise RequestError(f"{len(ids)} + {params.max_tokens} is more than max_seq_len {self._max_seq_len}")
        if self._max_input_len is not None and len(ids) > self._max_input_len:
            raise RequestError(f"{len(ids)} prompt tokens are more than max_input_len {self._max_input_len}")
        seed = (params.seed or 0) if self._honours_seeds else random.randrange(2**62)
        outputs = [self._sequence(ids, params, seed + copy, copy) for copy in range(params.n)]
        # The request is done with its last sequence: the others keep neither a reason nor what is done with it.
        last = max(outputs, key=lambda output: (len(output.token_ids), output.index))
        for output in outputs:
            if output is last and output.stop_reason is not None and not params.include_stop_str_in_output:
                output.token_ids.pop()
            elif output is not last:
                output.finish_reason = output.stop_reason = None
        return outputs

    def _sequence(self, ids: list[int], params: SamplingParams, seed: int, index: int) -> CompletionOutput:
        source = f"{ids}" if params.greedy else f"{ids}/{seed}"
        draws = random.Random(source)
        tokens: list[int] = []
        reason: FinishReason = "length"
        stop_reason = None
        while len(tokens) < params.max_tokens and reason == "length":
            if draws.random() < STOP_SHARE:
                reason = "stop"
                tokens.append(params.end_id)  # type: ignore[arg-type]  # asked for above
                break
            # Ordinary tokens of a tokenizer whose special ones come first.
            tokens.append(draws.randrange(3, self._vocab_size))
            if tokens[-1] in (params.stop_token_ids or ()):
                reason, stop_reason = "stop", tokens[-1]
        logprobs = self._logprobs(tokens, params)
        total = sum(next(iter(one.values())).logprob for one in logprobs) if logprobs else None
        if reason == "stop" and stop_reason is None and not self.keeps_end_token:
            tokens.pop()
            del logprobs[len(tokens) :]
        return CompletionOutput(index, "", tokens, total, logprobs, reason, stop_reason)

    def _logprobs(self, tokens: list[int], params: SamplingParams) -> list[dict[int, Logprob]]:
        """The sampled tokens' alone: TorchSampler's are the model's own, the other one's have the temperature in."""
        if params.logprobs is None or (not params.logprobs and not self._torch_sampler):
            return []
        tempered = 1.0 if self._torch_sampler else params.temperature or 1.0
        return [{token: Logprob(-math.log(self._vocab_size) / tempered, 1)} for token in tokens]
