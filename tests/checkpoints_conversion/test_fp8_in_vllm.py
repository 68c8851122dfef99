"""SmolLM2's FP8 folder in vLLM itself, on a CPU: every module computes what the folder says, and why log p differ.

Rounding inputs to e4m3 makes a model discontinuous: where two computations differ in the last bit of fp32, codes flip,
and after a few layers most do. So whole models are compared with what the simulation differs from itself by, when its
sums are taken in another order.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from fp8_simulation import Fp8Linear, toward_zero
from places import ROOT
from safetensors.torch import load_file
from torch import Tensor
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from vllm_environment import python_with_vllm

from srlm_mega.chat import Chat
from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import Resources
from srlm_mega.checkpoints_conversion.calibrate import calibrate
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert
from srlm_mega.checkpoints_conversion.fp8 import QUANT_CONFIG

pytestmark = pytest.mark.extra
CALIBRATED, COMPARED = 24, 5  # conversations, a hundred tokens each
SUMS = 1536**0.5 * 2.0**-23  # fp32's error of a sum of as many products as SmolLM2's longest, in another order
CONTINUOUS = 1e-3  # nats per token, between two programs that round nothing to e4m3 as they go
LIKE = 2  # differences of the same kind: vLLM's norms, attention and activation take other sums too, not products alone


@dataclass(frozen=True)
class Folders:
    """SmolLM2 from its package in 16 bits and in FP8, and texts that it was not calibrated on, as token ids."""

    plain: Path
    fp8: Path
    texts: list[list[int]]


@pytest.fixture(scope="module")
def folders(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("fp8")
    plain, fp8 = root / "plain", root / "fp8"
    convert(smollm2_gguf, plain, Wish(Kind.HUGGINGFACE, dtype=DType.BFLOAT16), Resources())
    chat = Chat.from_folder(plain)
    seen = [[*chat.prompt(one["prompt"]), *chat.completion(one["completion"])] for one in lines("ift.jsonl")]
    convert(plain, fp8, Wish(Kind.HUGGINGFACE, amax=calibrate(plain, seen[:CALIBRATED])), Resources())
    texts = [
        [*chat.prompt(one["context"]), *chat.completion(one["completions"][0]["completion"])]
        for one in lines("ranked.jsonl")[:COMPARED]
    ]
    return Folders(plain, fp8, texts)


def lines(name: str) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in (ROOT / "launch/data/real_text" / name).read_bytes().splitlines()]


def in_vllm(folder: Path, dtype: str, texts: list[list[int]], mode: str = "as it is") -> dict[str, Any]:
    """What vllm_fp8_worker.py finds in an environment with vLLM."""
    name = f"{folder.name} {dtype} {mode}"
    job, out = folder.with_name(f"{name}.job"), folder.with_name(f"{name}.json")
    job.write_text(json.dumps({"folder": str(folder), "dtype": dtype, "texts": texts, "out": str(out), "mode": mode}))
    worker = ROOT / "tests/support/vllm_fp8_worker.py"
    argv = [str(python_with_vllm()), str(worker), str(job)]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(worker.parent)}
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | settings, cwd="/")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def logprobs_in_vllm(folder: Path, dtype: str, texts: list[list[int]], mode: str = "as it is") -> Tensor:
    return torch.tensor(in_vllm(folder, dtype, texts, mode)["logprobs"])


@pytest.fixture(scope="module")
def in_fp32(folders: Folders) -> dict[str, Any]:
    """The FP8 folder in vLLM, everything between its FP8 products in fp32, and its modules one by one."""
    return in_vllm(folders.fp8, "float32", folders.texts, "modules")


def with_cut_cache(module: Any, query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any) -> Any:
    return sdpa_attention_forward(module, query, toward_zero(key), toward_zero(value), *more, **named)


AttentionInterface.register("fp8_cache", with_cut_cache)


def simulated(folders: Folders, rounds_inputs: bool = True, order: int | None = None) -> Tensor:
    """Log p by the simulation of the FP8 folder, in fp32. Unless inputs are rounded, keys and values are not either."""
    attention = "fp8_cache" if rounds_inputs else "sdpa"
    model = LlamaForCausalLM.from_pretrained(folders.plain, dtype=torch.float32, attn_implementation=attention)
    tensors = load_file(folders.fp8 / "model.safetensors")
    for name in [name for name, _ in model.named_modules() if f"{name}.weight_scale" in tensors]:
        model.set_submodule(name, Fp8Linear(tensors, name, rounds_inputs, order))
    return logprobs(model, folders.texts)


def logprobs(model: LlamaForCausalLM, texts: Sequence[list[int]]) -> Tensor:
    found = []
    for text in texts:
        tokens = torch.tensor([text])
        with torch.no_grad():
            there = model(tokens).logits[0, :-1].log_softmax(-1)
        found.append(there.gather(1, tokens[0, 1:, None])[:, 0])
    return torch.cat(found)


def distance(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference of log p per token, in nats."""
    return float((one - other).abs().mean())


def test_every_module_computes_what_the_folder_says(in_fp32: dict[str, Any]) -> None:
    rows = in_fp32["modules"]
    assert len(rows) == COMPARED * 30 * 5, "qkv, o, gate_up, down and the attention of 30 layers"
    assert max(row["error"] for row in rows) < SUMS
    assert min(row["control"] for row in rows) > 100 * SUMS
    # e4m3 has 448: the scale 1 of keys and values cuts nothing off.
    assert max(row["largest"] for row in rows if row["kind"] == "attn") < 448 / 8


def test_codes_and_scales_of_weights_are_read_as_they_are_meant(folders: Folders) -> None:
    """Without rounding of inputs, keys and values the whole model is continuous, and equal."""
    folder = folders.fp8.with_name("without_cache")
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(folders.fp8 / "model.safetensors")
    for name, section, key in (
        ("config.json", "quantization_config", "kv_cache_scheme"),
        (QUANT_CONFIG, "quantization", "kv_cache_quant_algo"),
    ):
        settings = json.loads((folders.fp8 / name).read_text())
        del settings[section][key]
        (folder / name).write_text(json.dumps(settings))
    theirs = logprobs_in_vllm(folder, "float32", folders.texts, "weights")
    assert distance(theirs, simulated(folders, rounds_inputs=False)) < CONTINUOUS


def test_log_p_differ_as_the_simulation_does_from_itself(folders: Folders, in_fp32: dict[str, Any]) -> None:
    ours = [simulated(folders, order=order) for order in (None, 1, 2)]
    itself = sum(distance(one, other) for one, other in combinations(ours, 2)) / 3
    engine = torch.tensor(in_fp32["logprobs"])
    sixteen_bits = logprobs_in_vllm(folders.fp8, "bfloat16", folders.texts)
    plain = logprobs_in_vllm(folders.plain, "bfloat16", folders.texts)
    between = {
        "simulation and itself": itself,
        "vLLM in fp32 and simulation": sum(distance(engine, one) for one in ours) / 3,
        "vLLM in bf16 and simulation": sum(distance(sixteen_bits, one) for one in ours) / 3,
        "vLLM in bf16 and in fp32": distance(sixteen_bits, engine),
    }
    to_16_bits = {
        "simulation": sum(distance(one, plain) for one in ours) / 3,
        "vLLM in fp32": distance(engine, plain),
        "vLLM in bf16": distance(sixteen_bits, plain),
    }
    print(json.dumps({"between": between, "to 16 bits": to_16_bits}, indent=2))  # shown by pytest -rP
    assert itself > 50 * CONTINUOUS, "the order of sums in fp32 is enough"
    assert between["vLLM in fp32 and simulation"] < LIKE * itself
    assert between["vLLM in bf16 and simulation"] < LIKE * between["vLLM in bf16 and in fp32"]
    assert max(to_16_bits.values()) < LIKE * min(to_16_bits.values())
