"""What nvidia-modelopt makes of a model, in a process of its own: it changes the libraries that it imports.

python modelopt_worker.py MODEL PROMPTS OUT
"""

import sys
from copy import deepcopy
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint
from transformers import LlamaForCausalLM

from srlm_mega.checkpoints_conversion.calibrate import calibrate, read_prompts


def main(folder: Path, prompts: Path, out: Path) -> None:
    """Exports of the model as it is and in FP8, and our calibration with the same prompts."""
    tokens = read_prompts(prompts, folder)
    calibrate(folder, tokens).save(out / "amax.json")
    for tp in (1, 2):
        engine_checkpoint(load(folder), out / f"bf16_tp{tp}", tp)
        engine_checkpoint(quantized(folder, tokens), out / f"fp8_tp{tp}", tp)
    export_hf_checkpoint(quantized(folder, tokens), export_dir=out / "fp8_unified")


def load(folder: Path) -> LlamaForCausalLM:
    """In bf16."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def quantized(folder: Path, tokens: list[list[int]]) -> LlamaForCausalLM:
    """Weights, inputs, keys and values in FP8."""
    config = deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"] = [*config["quant_cfg"], *deepcopy(mtq.FP8_KV_CFG["quant_cfg"])]

    def forward(model: torch.nn.Module) -> None:
        for prompt in tokens:
            model(torch.tensor([prompt]))

    return mtq.quantize(load(folder), config, forward)


def engine_checkpoint(model: LlamaForCausalLM, out: Path, tp: int) -> None:
    """TensorRT-LLM's layout."""
    with torch.inference_mode():
        export_tensorrt_llm_checkpoint(model, "llama", torch.bfloat16, export_dir=out, inference_tensor_parallel=tp)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
