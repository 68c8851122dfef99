"""Backend trtllm_engine: an engine built by `trtllm-build` of TensorRT-LLM 1.2, the last release line with engines.
Never run on real hardware (see trtllm_sampler.py)."""

from pathlib import Path

import tensorrt
import tensorrt_llm
import torch
from tensorrt_llm._tensorrt_engine import LLM
from tensorrt_llm.llmapi import KvCacheConfig

from srlm_mega.checkpoints_conversion.engine import Runtime, check_engine
from srlm_mega.checkpoints_conversion.huggingface_files import read_json
from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.errors import UserError
from srlm_mega.sampling.sampler import ModelLimits
from srlm_mega.sampling.trtllm_sampler import TrtllmSampler


def open_trtllm_engine(config: SamplerConfig, engine: Path, end_ids: tuple[int, ...]) -> TrtllmSampler:
    """Load an engine's folder. UserError when it was not built for these versions and this GPU."""
    try:
        record = check_engine(engine, runtime_here(), None, engine)
    except ValueError as error:
        raise UserError(f"sampler.backend=trtllm_engine: {error}; or take sampler.backend=trtllm_torch") from None
    vocabulary = int(read_json(engine / "config.json")["pretrained_config"]["vocab_size"])
    llm = LLM(
        model=str(engine),
        skip_tokenizer_init=True,
        kv_cache_config=KvCacheConfig(enable_block_reuse=True, free_gpu_memory_fraction=config.kv_cache_fraction),
    )
    # An engine gives log-probabilities only when it was built to gather all logits, so none are asked for.
    return TrtllmSampler(llm, end_ids, ModelLimits(record.limits.max_seq_len, vocabulary), logprobs=False)


def runtime_here() -> Runtime:
    """Return the versions and the GPU's compute capability that an engine must have been built for to run here."""
    major, minor = torch.cuda.get_device_capability()
    return Runtime(tensorrt_llm.__version__, tensorrt.__version__, f"{major}.{minor}")
