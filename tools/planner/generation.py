"""Sampling speed of GPUs: prefill bound by arithmetic, decoding by memory, the batch by the size of the KV cache.

This project has measured none of it. Kernels are as far from the data sheet as in training (step_time.py); a server's
overhead per token, TOKEN_SECONDS, is set by four published figures (tools/scripts/calibrate_planner.py).
"""

from dataclasses import dataclass
from functools import cached_property

from srlm_mega.config.model_sizes import ModelSizes
from srlm_mega.gpus import GpuModel
from srlm_mega.tools.planner.step_time import FITTED

TOKEN_SECONDS = 4.5e-5  # of a replica for each sampled token, outside the model: scheduling and sampling
ALL_REDUCE_SECONDS = 12e-6  # the shortest one over NVLink
USABLE = 0.95  # of a GPU's memory; the rest is the CUDA context and the allocator's
STEP_SECONDS = 2e-3  # of a decoding step outside the model


@dataclass(frozen=True)
class Replica:
    """A model that samples on `gpus` GPUs. Lengths are in tokens."""

    shape: ModelSizes
    gpu: GpuModel
    gpus: int
    fp8: bool  # weights and products
    fp8_cache: bool
    batch_limit: int = 2048
    cache_fraction: float = 0.9  # of the memory that the weights leave free

    @cached_property
    def weight_bytes(self) -> float:
        """Bytes of the whole model; embeddings and head stay in 16 bits."""
        vocabulary = (1 if self.shape.tied else 2) * self.shape.vocab * self.shape.hidden
        return (self.shape.parameters - vocabulary) * (1 if self.fp8 else 2) + vocabulary * 2

    @cached_property
    def token_cache_bytes(self) -> float:
        """Bytes of one token's keys and values, on all GPUs together."""
        return 2 * self.shape.num_layers * self.shape.kv_size * (1 if self.fp8_cache else 2)

    @cached_property
    def cache_tokens(self) -> float:
        """Number of tokens that fit with the weights; 0 when the weights alone do not fit."""
        free = self.gpus * self.gpu.memory_bytes * USABLE - self.weight_bytes
        return max(0.0, free * self.cache_fraction / self.token_cache_bytes)

    def batch(self, context: float) -> float:
        """Return the number of sequences at once with a mean of `context` tokens each; 0 when not even one fits."""
        return min(float(self.batch_limit), self.cache_tokens / context // 1)

    def prefill_seconds(self, tokens: float, context: float = 0.0) -> float:
        """Return the seconds to prefill `tokens` new tokens of one sequence after `context` cached ones."""
        shape = self.shape
        matrices = 2 * (shape.num_layers * shape.layer_parameters) * tokens / self._flops_per_second
        attention = 4 * shape.num_layers * shape.query_size * tokens * (context + tokens / 2)
        attention *= FITTED.attention / (self.gpus * self.gpu.teraflops("bf16") * 1e12 * self.gpu.sustained)
        return matrices + attention + self._messages_seconds(tokens)

    def decode_seconds(self, batch: float, context: float) -> float:
        """Return the seconds of one decoding step: a token for each sequence."""
        shape = self.shape
        read = self.weight_bytes + batch * context * self.token_cache_bytes
        reading = read / (self.gpus * self.gpu.memory_tbps * 1e12) * FITTED.passes
        arithmetic = 2 * (shape.num_layers * shape.layer_parameters + shape.vocab * shape.hidden) * batch
        latency = 2 * shape.num_layers * ALL_REDUCE_SECONDS if self.gpus > 1 else 0.0
        work = max(reading, arithmetic / self._flops_per_second)
        return work + self._messages_seconds(batch) + latency + STEP_SECONDS + batch * TOKEN_SECONDS

    def seconds(self, requests: float, prompt: float, shared: float, samples: float, output: float) -> float:
        """Return the seconds of the replica for this many requests, inf when the model does not fit: each has `shared`
        prompt tokens computed once for its `samples` outputs, and `prompt - shared` for each of them."""
        context = prompt + output / 2
        batch = min(self.batch(context), requests * samples)
        if batch < 1:
            return float("inf")
        prefill = self.prefill_seconds(shared) + samples * self.prefill_seconds(prompt - shared, shared)
        steps = requests * samples * output / batch
        return requests * prefill + steps * self.decode_seconds(batch, context)

    @cached_property
    def _flops_per_second(self) -> float:
        gpu = self.gpu
        factor = FITTED.matrices_fp8 if self.fp8 else FITTED.matrices_bf16
        return self.gpus * (gpu.teraflops("fp8" if self.fp8 else "bf16") / factor) * 1e12 * gpu.sustained

    def _messages_seconds(self, tokens: float) -> float:
        """Return the seconds of two all-reduces of 16-bit activations per layer."""
        if self.gpus == 1:
            return 0.0
        size = 2 * (self.gpus - 1) / self.gpus * tokens * self.shape.hidden * 2
        return 2 * self.shape.num_layers * size / self.gpu.group_bandwidth(self.gpus, 1)
