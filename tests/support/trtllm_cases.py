"""The ways in which TensorRT-LLM samples the contract's model: on one GPU, on two, in FP8, from an engine. As a program
it samples greedily and writes the token ids: `python trtllm_cases.py FOLDER OUT`, for the launcher."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, assert_never

import torch
from sampler_contract import END_IDS, GREEDY, POSITIONS, make_model, random_prompts

from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import Resources
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert
from srlm_mega.checkpoints_conversion.engine import Limits, build_engine
from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.sampling.backends import open_sampler
from srlm_mega.sampling.sampler import Sampler

Case = Literal["one GPU", "two GPUs", "FP8", "engine"]
BF16_GAP = 0.25  # two steps of bf16 between logits of 16 and 32
FP8_GAP = 1.0  # nobody has measured it


def why_not(case: Case) -> str:
    """Why a case cannot run here; empty where it can."""
    match case:
        case "one GPU":
            return ""
        case "two GPUs":
            return (
                "" if torch.cuda.device_count() > 1 else f"it needs two GPUs, and there is {torch.cuda.device_count()}"
            )
        case "FP8":
            capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
            return "" if capability >= (8, 9) else f"FP8 needs compute capability 8.9, and this GPU has {capability}"
        case "engine":
            if find_spec("tensorrt_llm._tensorrt_engine") is None:
                return "this TensorRT-LLM has no engines"
            return "" if shutil.which("trtllm-build") else "trtllm-build is not on the PATH"
        case _:
            assert_never(case)


def make_bf16_model(folder: Path) -> None:
    """The contract's model as TensorRT-LLM's attention knows it: heads of 64, sizes that are multiples of 16, bf16."""
    make_model(folder, head_size=64, dtype=torch.bfloat16)


def open_case(case: Case, folder: Path) -> Sampler:
    """The model of `make_bf16_model`, converted beside its folder where the case needs that, and loaded."""
    config = SamplerConfig(backend="trtllm_torch", batch_size=64, kv_cache_fraction=0.5)
    match case:
        case "one GPU":
            return open_sampler(config, folder, END_IDS)
        case "two GPUs":
            return open_sampler(config.model_copy(update={"tp_size": 2}), folder, END_IDS)
        case "FP8":
            from srlm_mega.checkpoints_conversion.calibrate import calibrate

            fp8 = folder.with_name("fp8")
            amax = calibrate(folder, [list(prompt) for prompt in random_prompts()])
            convert(folder, fp8, Wish(Kind.HUGGINGFACE, amax=amax), Resources())
            return open_sampler(config.model_copy(update={"quantization": "fp8"}), fp8, END_IDS)
        case "engine":
            from srlm_mega.sampling.trtllm_engine import runtime_here

            checkpoint = folder.with_name("checkpoint")
            convert(folder, checkpoint, Wish(Kind.TRTLLM, dtype=DType.BFLOAT16), Resources())
            limits = Limits(64, 8192, max_input_len=POSITIONS - 1, max_seq_len=POSITIONS)
            engine, _ = build_engine(checkpoint, folder.with_name("engines"), limits, runtime_here(), 1)
            return open_sampler(config.model_copy(update={"backend": "trtllm_engine"}), engine, END_IDS)
        case _:
            assert_never(case)


def main(folder: Path, out: Path) -> None:
    sampler = open_case("one GPU", folder)
    answers = sampler.sample(random_prompts(), GREEDY)
    out.write_text(json.dumps([answer.token_ids for (answer,) in answers]))
    sampler.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
