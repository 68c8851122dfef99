"""Backend trtllm_engine: an engine built by `trtllm-build` of TensorRT-LLM 1.2, the last release line with engines.
It ends with that line. Never run on real hardware (see trtllm_sampler.py)."""

import sys
from importlib.util import find_spec
from pathlib import Path

import tensorrt
import tensorrt_llm
import torch
from tensorrt_llm.llmapi import KvCacheConfig, SchedulerConfig

from srlm_mega.checkpoints_conversion.engine import Runtime, check_engine
from srlm_mega.checkpoints_conversion.huggingface_files import read_json
from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.errors import UserError
from srlm_mega.sampling.sampler import ModelLimits
from srlm_mega.sampling.trtllm_sampler import TrtllmSampler

ENDING = (
    "sampler.backend=trtllm_engine is ending: TensorRT-LLM 1.2 is the last version that builds and loads engines; "
    "sampler.backend=trtllm_torch samples the same model without one"
)


def open_trtllm_engine(config: SamplerConfig, engine: Path, end_ids: tuple[int, ...]) -> TrtllmSampler:
    """Load an engine's folder, and print that this backend is ending. UserError when the engine was not built for these
    versions and this GPU, or TensorRT-LLM has no engines any more. Never run on real hardware."""
    print(ENDING, file=sys.stderr)
    if find_spec("tensorrt_llm._tensorrt_engine") is None:
        raise UserError(f"TensorRT-LLM {tensorrt_llm.__version__} loads no engines: install 1.2, or take trtllm_torch")
    from tensorrt_llm._tensorrt_engine import LLM  # later versions do not have it

    try:
        record = check_engine(engine, runtime_here(), None, engine)
    except ValueError as error:
        raise UserError(f"sampler.backend=trtllm_engine: {error}; or take sampler.backend=trtllm_torch") from None
    vocabulary = int(read_json(engine / "config.json")["pretrained_config"]["vocab_size"])
    llm = LLM(
        model=str(engine),
        skip_tokenizer_init=True,
        scheduler_config=SchedulerConfig(capacity_scheduler_policy=config.scheduler_policy),
        kv_cache_config=KvCacheConfig(enable_block_reuse=True, free_gpu_memory_fraction=config.kv_cache_fraction),
    )
    limits = ModelLimits(record.limits.max_seq_len, vocabulary)
    # An engine gives log-probabilities only when it was built to gather all logits, so none are asked for.
    return TrtllmSampler(llm, end_ids, limits, record.limits.max_batch_size, untempered=False)


def runtime_here() -> Runtime:
    """Return the versions and the GPU's compute capability that an engine must have been built for to run here."""
    major, minor = torch.cuda.get_device_capability()
    return Runtime(tensorrt_llm.__version__, tensorrt.__version__, f"{major}.{minor}")
