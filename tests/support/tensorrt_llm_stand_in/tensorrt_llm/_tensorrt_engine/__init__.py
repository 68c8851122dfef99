"""STAND-IN of `tensorrt_llm._tensorrt_engine` (see the package): LLM of the TensorRT backend, on a built engine. What
the engine was built for cannot be given again."""

import json
from pathlib import Path

from tensorrt_llm.llmapi import LLM as PyTorchLLM
from tensorrt_llm.llmapi import KvCacheConfig


class LLM(PyTorchLLM):
    """Its sampler is the C++ runtime's, which honours seeds."""

    backend = "tensorrt"

    def __init__(
        self,
        model: str | Path,
        *,
        skip_tokenizer_init: bool = False,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        kv_cache_config: KvCacheConfig | None = None,
    ) -> None:
        self._start(model, skip_tokenizer_init)
        build = json.loads((Path(model) / "config.json").read_text())["build_config"]
        self._max_input_len, self._max_seq_len = build["max_input_len"], build["max_seq_len"]
        self._max_num_tokens = None
        self._honours_seeds = True
