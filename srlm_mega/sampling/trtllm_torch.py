"""Backend trtllm_torch: TensorRT-LLM's PyTorch backend on a Hugging Face folder as it is, bf16 or unified FP8. Written
for 1.2 to 1.4, never run on real hardware (see trtllm_sampler.py)."""

from pathlib import Path

from tensorrt_llm import LLM
from tensorrt_llm.llmapi import CudaGraphConfig, KvCacheConfig, SchedulerConfig, TorchLlmArgs

from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.sampling.sampler import ModelLimits
from srlm_mega.sampling.trtllm_sampler import TrtllmSampler


def open_trtllm_torch(config: SamplerConfig, model_folder: Path, end_ids: tuple[int, ...]) -> TrtllmSampler:
    """Load the folder's model on tp_size * pp_size GPUs; never run on real hardware. UserError when the folder has no
    config.json."""
    limits = ModelLimits.of_folder(model_folder)
    known = TorchLlmArgs.model_fields
    # What versions do or do not have, and need not have: the rest they must know.
    by_version = {
        "sampler_type": "TRTLLMSampler",  # only this one honours a request's seed in 1.2; 1.4 has TorchSampler alone
        "max_input_len": limits.max_positions,  # 1024 where it is left out
        "batch_wait_timeout_iters": config.batch_wait_timeout_iters,
        "batch_wait_max_tokens_ratio": config.batch_wait_max_tokens_ratio,
    }
    llm = LLM(
        model=str(model_folder),
        skip_tokenizer_init=True,  # token ids go in and out: text is made by chat/ alone
        tensor_parallel_size=config.tp_size,
        pipeline_parallel_size=config.pp_size,
        max_batch_size=config.batch_size,
        max_num_tokens=config.max_num_tokens,
        max_seq_len=limits.max_positions,
        enable_chunked_prefill=True,
        # Without padding only batches of 1 to 32, 64 and 128 sequences are decoded by a recorded graph.
        cuda_graph_config=CudaGraphConfig(enable_padding=True, max_batch_size=config.batch_size),
        scheduler_config=SchedulerConfig(capacity_scheduler_policy=config.scheduler_policy),
        allreduce_strategy=config.allreduce_strategy if config.tp_size > 1 else "AUTO",
        kv_cache_config=KvCacheConfig(
            enable_block_reuse=True,
            free_gpu_memory_fraction=config.kv_cache_fraction,
            dtype=config.kv_cache_dtype,
        ),
        **{name: value for name, value in by_version.items() if name in known and value is not None},
    )
    return TrtllmSampler(llm, end_ids, limits, config.batch_size, untempered="sampler_type" not in known)
