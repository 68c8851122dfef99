"""STAND-IN of `tensorrt_llm.llmapi` (see the package): LLM of the PyTorch backend, parameters, outputs."""

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

FinishReason = Literal["stop", "length", "timeout", "cancelled"]
STOP_SHARE = 0.1


class RequestError(RuntimeError):
    """A request that the runtime refuses."""


@dataclass(kw_only=True)
class KvCacheConfig:
    """All documented fields; an unknown one is a TypeError (the real one: a ValidationError)."""

    enable_block_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None
    sink_token_length: int | None = None
    free_gpu_memory_fraction: float = 0.9
    host_cache_size: int | None = None
    onboard_blocks: bool = True
    cross_kv_cache_fraction: float | None = None
    secondary_offload_min_priority: int | None = None
    event_buffer_max_size: int = 0
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    use_uvm: bool = False
    dtype: str = "auto"
    tokens_per_block: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.free_gpu_memory_fraction <= 1:
            raise ValueError("kv_cache_config.free_gpu_memory_fraction must be a float between 0 and 1")
        if self.dtype not in ("auto", "fp8", "float16", "bfloat16"):
            raise ValueError(f"kv_cache_config.dtype {self.dtype!r}")


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Documented fields and defaults; note `max_tokens`."""

    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: str | list[str] | None = None
    bad_token_ids: list[int] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    top_p: float | None = None
    top_p_min: float | None = None
    top_p_reset_ids: int | None = None
    top_p_decay: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_p: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    return_perf_metrics: bool = False
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.pad_id is None:
            self.pad_id = self.end_id
        self.best_of = self.best_of or self.n
        if self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) cannot be less than n ({self.n})")
        if self.best_of > 1 and self.greedy:
            raise ValueError("Greedy decoding in the LLM API does not allow multiple returns.")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"require temperature > 0, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"require 0 < top_p <= 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed} is not a uint64")

    @property
    def greedy(self) -> bool:
        """With temperature, top_p and top_k unset, or top_k 1."""
        unset = self.temperature is None and self.top_p is None and self.top_k is None
        return not self.use_beam_search and (unset or self.top_k == 1)


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A finished request."""

    request_id: int
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt: str | None = None
    finished: bool = True


class LLM:
    """The documented arguments of the PyTorch backend that a text model has. `keeps_end_token` is the stand-in's own:
    both answers are seen in the wild."""

    backend = "pytorch"
    keeps_end_token = False

    def __init__(
        self,
        model: str | Path,
        tokenizer: str | Path | None = None,
        *,
        tokenizer_mode: Literal["auto", "slow"] = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        pipeline_parallel_size: int = 1,
        context_parallel_size: int = 1,
        gpus_per_node: int | None = None,
        max_batch_size: int | None = 2048,
        max_input_len: int | None = 1024,
        max_seq_len: int | None = None,
        max_beam_width: int | None = 1,
        max_num_tokens: int | None = 8192,
        enable_chunked_prefill: bool = False,
        kv_cache_config: KvCacheConfig | None = None,
        sampler_type: Literal["auto", "TorchSampler", "TRTLLMSampler"] = "auto",
        disable_overlap_scheduler: bool = False,
    ) -> None:
        self._start(model, skip_tokenizer_init)
        self._max_input_len = max_input_len
        self._max_seq_len = max_seq_len or self._model_positions
        self._max_num_tokens = None if enable_chunked_prefill else max_num_tokens
        assert sampler_type in ("auto", "TorchSampler", "TRTLLMSampler"), sampler_type
        self._honours_seeds = sampler_type == "TRTLLMSampler"

    def _start(self, model: str | Path, skip_tokenizer_init: bool) -> None:
        config = json.loads((Path(model) / "config.json").read_text())
        config = config.get("pretrained_config", config)  # of an engine
        self._vocab_size = int(config["vocab_size"])
        self._model_positions = int(config["max_position_embeddings"])
        if not skip_tokenizer_init:
            raise OSError(f"no tokenizer in {model}")
        self._request_ids = itertools.count()
        self._shut_down = False

    def generate(
        self,
        inputs: Sequence[int] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> RequestOutput | list[RequestOutput]:
        """One request or several; one set of parameters, or one for each."""
        assert not self._shut_down, "generate after shutdown"
        if inputs and isinstance(inputs[0], int):
            return self._answer(list(inputs), self._params_of(sampling_params, 0))  # type: ignore[arg-type]
        if isinstance(sampling_params, list) and len(sampling_params) != len(inputs):
            raise ValueError(f"{len(inputs)} inputs, {len(sampling_params)} sampling_params")
        return [
            self._answer(ids, self._params_of(sampling_params, place))  # type: ignore[arg-type]
            for place, ids in enumerate(inputs)
        ]

    def shutdown(self) -> None:
        """Free everything."""
        self._shut_down = True

    def _params_of(self, params: SamplingParams | list[SamplingParams] | None, place: int) -> SamplingParams:
        one = params[place] if isinstance(params, list) else params
        if one is None or one.end_id is None:
            raise ValueError("tokenizer is required to initialize a default sampling_params, or give end_id")
        if not isinstance(one, SamplingParams):
            raise TypeError(f"Expected SamplingParams, got {type(one)}")
        if one.stop is not None or one.bad is not None:
            raise ValueError("stop and bad strings need a tokenizer")
        if one.logprobs and self.backend == "tensorrt":
            raise ValueError("logprobs need an engine that was built with gather_generation_logits")
        return one

    def _answer(self, ids: list[int], params: SamplingParams) -> RequestOutput:
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise TypeError(f"a prompt is a list of int, got {type(ids)}")
        if not ids:
            raise RequestError("prompt_token_ids is empty")
        if len(ids) + params.max_tokens > self._max_seq_len:
            raise RequestError(f"{len(ids)} + {params.max_tokens} is more than max_seq_len {self._max_seq_len}")
        if self._max_input_len is not None and len(ids) > self._max_input_len:
            raise RequestError(f"{len(ids)} prompt tokens are more than max_input_len {self._max_input_len}")
        if self._max_num_tokens is not None and len(ids) > self._max_num_tokens:
            raise RequestError(f"{len(ids)} prompt tokens are more than max_num_tokens {self._max_num_tokens}")
        seed = (params.seed or 0) if self._honours_seeds else random.randrange(2**62)
        outputs = [self._sequence(ids, params, seed + copy, copy) for copy in range(params.n)]
        # The request is done with its last sequence: the others keep neither a reason nor what is done with it.
        last = max(outputs, key=lambda output: (len(output.token_ids), output.index))
        for output in outputs:
            if output is last and output.stop_reason is not None and not params.include_stop_str_in_output:
                output.token_ids.pop()
            elif output is not last:
                output.finish_reason = output.stop_reason = None
        return RequestOutput(next(self._request_ids), ids, outputs)

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
        logprob = -math.log(self._vocab_size) * len(tokens) if params.logprobs else None
        if reason == "stop" and stop_reason is None and not self.keeps_end_token:
            tokens.pop()
        return CompletionOutput(index, "", tokens, logprob, [], reason, stop_reason)
