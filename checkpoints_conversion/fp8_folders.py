"""The files of FP8 checkpoints: TensorRT-LLM's engine layout, and the unified Hugging Face folder of its PyTorch
backend, which vLLM reads too. Scales are fp32, the same on every rank."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from srlm_mega.checkpoints_conversion import trtllm
from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import Plan
from srlm_mega.checkpoints_conversion.fp8 import Quantizer, Rounding, Scales, linear_names
from srlm_mega.checkpoints_conversion.huggingface_files import (
    CONFIG,
    KIND,
    MAX_SHARD_BYTES,
    TensorEntry,
    pretty_json,
    safetensors_files,
    safetensors_shards,
)
from srlm_mega.checkpoints_conversion.llama import LlamaShape, huggingface_shapes
from srlm_mega.checkpoints_conversion.patches import whole

QUANT_CONFIG = "hf_quant_config.json"
NOT_QUANTIZED = ["lm_head", "model.embed_tokens"]
FLOAT = {"dynamic": False, "num_bits": 8, "type": "float"}
KV_SCALE = 1.0  # keys and values fit e4m3 as they are; a calibrated scale gains nothing


def engine_plan(shape: LlamaShape, split: trtllm.RankSplit, dtype: DType, scales: Scales) -> Plan:
    """Plan a checkpoint for `trtllm-build`; everything but the linear layers is of `dtype`."""
    files: dict[str, list[TensorEntry]] = {}
    for file, name, size, matrix in trtllm.rank_matrices(shape, split):
        entries = files.setdefault(file, [])
        linear = matrix.patches[0].source.removesuffix(".weight") if matrix.patches else ""
        if ".layers." not in name or "layernorm" in name:
            entries.append(TensorEntry(name, dtype, size, matrix))
            continue
        module = name.removesuffix(".weight")
        entries.append(TensorEntry(name, DType.FLOAT8_E4M3, size, matrix, scales.weights[linear]))
        entries.append(_scale(f"{module}.weights_scaling_factor", (1,), scales.weights[linear]))
        entries.append(_scale(f"{module}.activation_scaling_factor", (1,), scales.inputs[linear]))
        if module.endswith("attention.qkv"):
            attention = module.removesuffix(".qkv")
            entries.append(_scale(f"{attention}.kv_cache_scaling_factor", (1,), KV_SCALE))
    config = trtllm.config(shape, split, dtype)
    config["quantization"] = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    outputs, stored = safetensors_files(files)
    return Plan(trtllm.KIND, dtype, outputs, stored, {CONFIG: pretty_json(config)}, Quantizer(Rounding.DIRECT))


def unified_plan(shape: LlamaShape, config: Mapping[str, Any], dtype: DType, scales: Scales) -> Plan:
    """Plan a unified Hugging Face folder; everything but the linear layers is of `dtype`."""
    quantized = set(linear_names(shape))
    entries = []
    for name, size in huggingface_shapes(shape).items():
        linear = name.removesuffix(".weight")
        entry = TensorEntry(name, dtype, size, whole(name, size))
        if linear not in quantized:
            entries.append(entry)
            continue
        entries.append(replace(entry, dtype=DType.FLOAT8_E4M3, scale=scales.weights[linear]))
        entries.append(_scale(f"{linear}.weight_scale", (), scales.weights[linear]))
        entries.append(_scale(f"{linear}.input_scale", (), scales.inputs[linear]))
        for which in ("k", "v"):
            if linear.endswith(f".{which}_proj"):
                entries.append(_scale(f"{linear}.{which}_scale", (), KV_SCALE))
    outputs, stored, texts = safetensors_shards(entries, MAX_SHARD_BYTES)
    texts[QUANT_CONFIG] = pretty_json(
        {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": NOT_QUANTIZED}}
    )
    quantization = {
        "config_groups": {"group_0": {"input_activations": FLOAT, "weights": FLOAT, "targets": ["Linear"]}},
        "ignore": NOT_QUANTIZED,
        "quant_algo": "FP8",
        "kv_cache_scheme": FLOAT,
        "quant_method": "modelopt",  # the reader's name for this layout
    }
    texts[CONFIG] = pretty_json({**config, "torch_dtype": dtype.torch_name, "quantization_config": quantization})
    return Plan(KIND, dtype, outputs, stored, texts, Quantizer(Rounding.BY_16_BITS))


def _scale(name: str, shape: tuple[int, ...], value: float) -> TensorEntry:
    return TensorEntry(name, DType.FLOAT32, shape, np.float32(value).tobytes())
