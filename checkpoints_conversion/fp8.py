"""FP8 (e4m3) weights: shared scales, exact rounding, `amax.json`, and the two kinds of checkpoints that hold them:
TensorRT-LLM's engine layout, and the unified Hugging Face folder of its PyTorch backend, which vLLM reads too.

w ~= w8 * scale, with scale = largest |w| / 448. Queries, keys and values share one scale, gate and up another, because
readers that fuse these matrices would round again otherwise. Activation scales come from a calibration (calibrate.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srlm_mega.checkpoints_conversion import trtllm
from srlm_mega.checkpoints_conversion.bits import Bits, DType, cast, from_float32, to_float32
from srlm_mega.checkpoints_conversion.build import MAX_BLOCK_BYTES, Plan, Report
from srlm_mega.checkpoints_conversion.huggingface_files import (
    CONFIG,
    KIND,
    MAX_SHARD_BYTES,
    TensorEntry,
    pretty_json,
    read_json,
    safetensors_files,
    safetensors_shards,
    typed_config,
)
from srlm_mega.checkpoints_conversion.llama import LlamaShape, huggingface_shapes
from srlm_mega.checkpoints_conversion.patches import whole
from srlm_mega.checkpoints_conversion.reader import Checkpoint, Reader

LARGEST = 448.0  # of e4m3
# Linear layers that share a scale: those in one line see the same input.
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
QUANT_CONFIG = "hf_quant_config.json"
NOT_QUANTIZED = ["lm_head", "model.embed_tokens"]
FLOAT = {"dynamic": False, "num_bits": 8, "type": "float"}
KV_SCALE = 1.0  # keys and values fit e4m3 as they are; a calibrated scale gains nothing
CHUNK = 1 << 15  # numbers whose table indices fit the processor's nearest caches


class Rounding(Enum):
    """The way from w / scale to e4m3: at once, or through the 16-bit format. A few codes of a thousand differ."""

    DIRECT = "engine checkpoints"
    BY_16_BITS = "unified Hugging Face folders"


@lru_cache(maxsize=256)
def code_table(dtype: DType, scale: float, rounding: Rounding) -> Bits:
    """Return the codes of all 65,536 numbers of a 16-bit format, by their bits."""
    assert dtype.itemsize == 2, f"{dtype} is not of 16 bits"
    numbers = to_float32(np.arange(1 << 16).astype(dtype.storage), dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # numbers far beyond the scale do not occur
        scaled = numbers / np.float32(scale)
        if rounding is Rounding.BY_16_BITS:
            scaled = to_float32(from_float32(scaled, dtype), dtype)
    return e4m3(scaled)


def e4m3(numbers: NDArray[np.float32]) -> Bits:
    """Round to codes (sign, 4 bits of exponent with bias 7, 3 of mantissa), ties to even; more than 448 becomes 448."""
    code = np.arange(127)  # 127 is NaN
    exponent, mantissa = code >> 3, code & 7
    values = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    magnitude = np.abs(numbers)
    lower = np.searchsorted(middles, magnitude, side="left")  # a tie goes down
    upper = np.searchsorted(middles, magnitude, side="right")  # a tie goes up
    nearest = np.where(lower % 2 == 0, lower, upper)
    codes: Bits = (nearest | np.where(np.signbit(numbers), 0x80, 0)).astype(np.uint8)
    return codes


@dataclass(frozen=True)
class Quantizer:
    """Turns 16-bit numbers into e4m3 codes by a table: the same as the arithmetic, and several times faster."""

    rounding: Rounding

    def __call__(self, bits: Bits, dtype: DType, scale: float) -> Bits:
        table = code_table(dtype, scale, self.rounding)
        codes: Bits = np.empty(bits.shape, np.uint8)
        flat, target = bits.reshape(-1), codes.reshape(-1)
        index = np.empty(min(CHUNK, flat.size), np.intp)
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            index[: part.size] = part
            np.take(table, index[: part.size], out=target[start : start + CHUNK], mode="clip")
        return codes


@dataclass(frozen=True)
class Amax:
    """`amax.json`: the largest |input| of each linear layer, by its Hugging Face name without `.weight`."""

    num_prompts: int
    inputs: dict[str, float]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_bytes(pretty_json(asdict(self)))

    @classmethod
    def load(cls, path: Path, shape: LlamaShape) -> "Amax":
        """Read a file. ValueError unless it has one positive number for every linear layer of the model."""
        found = read_json(path)
        inputs = found.get("inputs")
        if not isinstance(inputs, dict):
            raise ValueError(f"{path} has no `inputs`: it was not written by a calibration, give its amax.json")
        wanted = set(linear_names(shape))
        if inputs.keys() != wanted:
            some = ", ".join(sorted(wanted ^ inputs.keys())[:3])
            raise ValueError(f"{path} is not of this model: {some} are in one and not in the other. Calibrate again")
        for name, value in inputs.items():
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise ValueError(f"{path}: {name} has {value}: calibrate again")
        return cls(found.get("num_prompts", 0), inputs)


def outgrown(reference: Amax, probe: Amax, margin: float) -> dict[str, float]:
    """Return the layers whose inputs in a probe of few prompts exceed `margin` times those of the calibration, and the
    ratio: with any of them, calibrate again."""
    ratios = {name: value / reference.inputs[name] for name, value in probe.inputs.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio > margin}


def linear_names(shape: LlamaShape) -> Iterator[str]:
    """Yield the names of the layers that become FP8."""
    for layer in range(shape.num_layers):
        for members in GROUPS.values():
            for member in members:
                yield f"model.layers.{layer}.{member}"


@dataclass(frozen=True)
class Scales:
    """The scales of weights and of activations, by the linear layer's Hugging Face name."""

    weights: Mapping[str, float]
    inputs: Mapping[str, float]


def group_of(linear: str) -> tuple[int, str]:
    """Return the layer's number and the group of a linear layer, given its Hugging Face name."""
    layer, member = linear.removeprefix("model.layers.").split(".", 1)
    return int(layer), next(group for group, members in GROUPS.items() if member in members)


def shared_scales(largest: Mapping[str, float]) -> dict[str, float]:
    """Return the scale of each linear layer: the largest number of its group / 448; 1 for a group of zeros."""
    per_group: dict[tuple[int, str], float] = {}
    for linear, value in largest.items():
        group = group_of(linear)
        per_group[group] = max(value, per_group.get(group, 0.0))
    scales = {group: float(np.float32(value) / np.float32(LARGEST)) or 1.0 for group, value in per_group.items()}
    return {linear: scales[group_of(linear)] for linear in largest}


def weight_amax(source: Checkpoint, dtype: DType, report: Report) -> dict[str, float]:
    """Find the largest |w| of every linear layer, rounded to `dtype`, in one pass over the weights."""
    with Reader(source) as reader:
        for linear in linear_names(source.shape):
            for block in reader.blocks(f"{linear}.weight", MAX_BLOCK_BYTES):
                report(block.nbytes)
        return largest_weights(source, dtype, reader, linear_names(source.shape))


def largest_weights(source: Checkpoint, dtype: DType, reader: Reader, linears: Iterable[str]) -> dict[str, float]:
    """Return the largest |w| of linear layers, rounded to `dtype`, from a reader that has read all their rows."""
    bits = {linear: np.array([reader.largest[f"{linear}.weight"]], source.dtype.storage) for linear in linears}
    return {linear: float(to_float32(cast(one, source.dtype, dtype), dtype)[0]) for linear, one in bits.items()}


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
    texts[CONFIG] = pretty_json(typed_config(config, dtype) | {"quantization_config": quantization})
    return Plan(KIND, dtype, outputs, stored, texts, Quantizer(Rounding.BY_16_BITS))


def _scale(name: str, shape: tuple[int, ...], value: float) -> TensorEntry:
    return TensorEntry(name, DType.FLOAT32, shape, np.float32(value).tobytes())
