"""The log p that vLLM gives the tokens of some texts, and what each of its modules makes of its inputs, in FP8.

python vllm_fp8_worker.py JOB.json, in an environment with vLLM for CPUs. JOB: folder, dtype, texts (token ids), out and
`mode`: "as it is", "modules" (compared one by one with fp8_simulation.py), or "weights" (inputs are not rounded).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {  # before vllm is imported: the engine in this process, one GiB of cache, no network
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `apply_model` takes a function
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from fp8_simulation import Fp8Linear, attention, nearest, relative_error, toward_zero
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8PerTensorScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.pytorch import PerTensorTorchFP8ScaledMMLinearKernel
from vllm.model_executor.layers.fusion import fused_act_quant
from vllm.model_executor.layers.quantization.modelopt import ModelOptFp8Config

LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def prepare(mode: str) -> None:
    """Make vLLM compute what a GPU does where this build for CPUs does something else, and in fp32 too."""
    fused_act_quant._FUSED_ACT_QUANT.clear()  # it calls silu_and_mul_quant, which builds for CPUs do not have
    ModelOptFp8Config.get_supported_act_dtypes = lambda self: [torch.bfloat16, torch.float16, torch.float32]
    # With AMX it would not round inputs.
    CPUFp8PerTensorScaledMMLinearKernel.is_supported = classmethod(lambda cls, capability=None: (False, "AMX"))
    if mode == "weights":

        def product(self: Any, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            codes, scale, *_ = self._get_layer_params(layer)
            return (x.float() @ codes.float() * scale).to(x.dtype)

        PerTensorTorchFP8ScaledMMLinearKernel.apply_weights = product


def watch(model: nn.Module, folder: Path) -> list[dict[str, Any]]:
    """Compare the modules with the simulation as they compute, each with its own inputs. A row for each: its error, and
    that of a control: a scale 1 % larger, keys and values rounded to nearest."""
    tensors, rows = load_file(folder / "model.safetensors"), []

    def compare_attention(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        query, key, value = (part.unflatten(-1, (-1, module.head_size)) for part in inputs[:3])
        error, control = (
            relative_error(output, attention(query, rounded(key), rounded(value)).flatten(1))
            for rounded in (toward_zero, nearest)
        )
        largest = max(float(key.abs().max()), float(value.abs().max()))
        rows.append({"kind": "attn", "error": error, "control": control, "largest": largest})

    def linear_hook(name: str) -> Any:
        right, wrong = Fp8Linear(tensors, name), Fp8Linear(tensors, name)
        wrong.input_scale = wrong.input_scale * 1.01

        def compare(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
            error, control = (relative_error(output[0], linear(inputs[0])) for linear in (right, wrong))
            rows.append({"kind": name.rpartition(".")[2], "error": error, "control": control})

        return compare

    for name, module in model.named_modules():
        if name.startswith("model.layers."):
            if name.endswith(".attn"):
                module.register_forward_hook(compare_attention)
            elif name.endswith(LINEARS):
                module.register_forward_hook(linear_hook(name))
    return rows


def main(job: dict[str, Any]) -> None:
    """Write {"logprobs": [...], "modules": [...]} to the job's `out`."""
    prepare(job["mode"])
    llm = LLM(
        model=job["folder"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        distributed_executor_backend="uni",
    )
    modules: list[dict[str, Any]] = []
    if job["mode"] == "modules":
        (modules,) = llm.apply_model(lambda model: watch(model, Path(job["folder"])))
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    logprobs = []
    for tokens in job["texts"]:
        (answer,) = llm.generate([{"prompt_token_ids": tokens}], [params], use_tqdm=False)
        logprobs += [answer.prompt_logprobs[place][tokens[place]].logprob for place in range(1, len(tokens))]
    Path(job["out"]).write_text(json.dumps({"logprobs": logprobs, "modules": modules}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
