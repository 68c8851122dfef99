"""STAND-IN of `tensorrt_llm.llmapi.llm_args`: arguments of `LLM`, with the documented defaults. Unknown ones are
refused, as the real ones do (`extra="forbid"`)."""

from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tensorrt_llm.form import OLD


class StrictBaseModel(BaseModel):
    """A model that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


class KvCacheConfig(StrictBaseModel):
    """All documented fields."""

    enable_block_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None
    sink_token_length: int | None = None
    free_gpu_memory_fraction: float = Field(default=0.9, ge=0, le=1)
    host_cache_size: int | None = None
    onboard_blocks: bool = True
    cross_kv_cache_fraction: float | None = None
    secondary_offload_min_priority: int | None = None
    event_buffer_max_size: int = 0
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    use_uvm: bool = False
    dtype: Literal["auto", "fp8", "float16", "bfloat16"] = "auto"
    tokens_per_block: int = 32


class CudaGraphConfig(StrictBaseModel):
    """Sizes of batches that are decoded by a recorded graph."""

    batch_sizes: list[int] | None = None
    max_batch_size: int = Field(default=0, ge=0)
    enable_padding: bool = False


class CapacitySchedulerPolicy(StrEnum):
    """When a request is let in."""

    MAX_UTILIZATION = "MAX_UTILIZATION"
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    STATIC_BATCH = "STATIC_BATCH"


class SchedulerConfig(StrictBaseModel):
    """The scheduler's policies."""

    capacity_scheduler_policy: CapacitySchedulerPolicy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    context_chunking_policy: str | None = None
    dynamic_batch_config: Any = None


class BaseLlmArgs(StrictBaseModel):
    """Arguments of every backend that a text model has."""

    model: str | Path
    tokenizer: str | Path | None = None
    tokenizer_mode: Literal["auto", "slow"] = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    revision: str | None = None
    tokenizer_revision: str | None = None
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    gpus_per_node: int | None = None
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
    enable_chunked_prefill: bool = False
    scheduler_config: SchedulerConfig = Field(default_factory=SchedulerConfig)
    max_batch_size: int | None = 2048
    max_input_len: int | None = 1024
    max_seq_len: int | None = None
    max_beam_width: int | None = 1
    max_num_tokens: int | None = 8192


class PyTorchLlmArgs(BaseLlmArgs):
    """1.4's arguments of the PyTorch backend."""

    cuda_graph_config: CudaGraphConfig | None = Field(default_factory=CudaGraphConfig)
    disable_overlap_scheduler: bool = False
    attn_backend: str = "TRTLLM"
    batch_wait_timeout_ms: float = Field(default=0, ge=0)
    batch_wait_timeout_iters: int = Field(default=0, ge=0)
    batch_wait_max_tokens_ratio: float = Field(default=0, ge=0, le=1)
    enable_autotuner: bool = True
    stream_interval: int = 1
    allreduce_strategy: (
        Literal["AUTO", "NCCL", "UB", "MINLATENCY", "ONESHOT", "TWOSHOT", "LOWPRECISION", "MNNVL", "NCCL_SYMMETRIC"]
        | None
    ) = "AUTO"


class SamplerTypeLlmArgs(PyTorchLlmArgs):
    """1.2's, which has one more."""

    sampler_type: Literal["auto", "TorchSampler", "TRTLLMSampler"] = "auto"


class TrtLlmArgs(BaseLlmArgs):
    """1.2's arguments of the TensorRT backend; what the engine was built for cannot be given again."""

    @field_validator("kv_cache_config")
    @classmethod
    def validate_kv_cache_dtype(cls, value: KvCacheConfig) -> KvCacheConfig:
        """The KV cache's type is the engine's."""
        assert value.dtype == "auto", "KvCacheConfig.dtype is not supported by the TensorRT backend."
        return value


TorchLlmArgs = SamplerTypeLlmArgs if OLD else PyTorchLlmArgs
