"""STAND-IN of `tensorrt_llm._tensorrt_engine` (see the package): LLM of the TensorRT backend, on a built engine."""

import json
from pathlib import Path

from tensorrt_llm.executor import RequestOutput
from tensorrt_llm.llmapi.llm import LLM as PyTorchLLM
from tensorrt_llm.llmapi.llm_args import TrtLlmArgs
from tensorrt_llm.sampling_params import SamplingParams


class LLM(PyTorchLLM):
    """Its sampler is the C++ runtime's, which honours seeds."""

    args_class = TrtLlmArgs

    def _setup(self) -> None:
        self._torch_sampler, self._honours_seeds = False, True
        build = json.loads((Path(self.args.model) / "config.json").read_text())["build_config"]
        self._max_input_len, self._max_seq_len = build["max_input_len"], build["max_seq_len"]
        self._max_num_tokens = None

    def generate_async(
        self, inputs: list[int], sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> RequestOutput:
        """Ask for one prompt; log-probabilities need all logits."""
        if sampling_params is not None and sampling_params.logprobs:
            raise ValueError("logprobs need an engine that was built with gather_generation_logits")
        return super().generate_async(inputs, sampling_params, streaming)
