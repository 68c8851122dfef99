"""FP8 (e4m3) weights: shared scales, exact rounding, and the files that both backends of TensorRT-LLM read.

w ~= w8 * scale, with scale = largest |w| / 448. Queries, keys and values share one scale, gate and up another: readers
that fuse these matrices would round again otherwise. Activation scales come from a calibration (calibrate.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from srlm_mega.checkpoints_conversion.bits import Bits, DType, cast, from_float32, to_float32
from srlm_mega.checkpoints_conversion.build import MAX_BLOCK_BYTES, Report
from srlm_mega.checkpoints_conversion.huggingface_files import pretty_json, read_json
from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.checkpoints_conversion.reader import Checkpoint, Reader

LARGEST = 448.0  # of e4m3
# Linear layers that share a scale: those in one line see the same input.
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
CHUNK = 1 << 15  # numbers whose table indices fit the processor's nearest caches


class Rounding(Enum):
    """How w / scale becomes e4m3: at once, or by way of the 16-bit format. They differ in a few codes of a thousand."""

    DIRECT = "engine checkpoints"
    BY_16_BITS = "unified Hugging Face folders"


@lru_cache(maxsize=256)
def code_table(dtype: DType, scale: float, rounding: Rounding) -> Bits:
    """The code of each of the 65,536 numbers of a 16-bit format."""
    assert dtype.itemsize == 2, f"{dtype} is not of 16 bits"
    numbers = to_float32(np.arange(1 << 16).astype(dtype.storage), dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # numbers far beyond the scale do not occur
        scaled = numbers / np.float32(scale)
        if rounding is Rounding.BY_16_BITS:
            scaled = to_float32(from_float32(scaled, dtype), dtype)
    return e4m3(scaled)


def e4m3(numbers: NDArray[np.float32]) -> Bits:
    """Codes: sign, 4 bits of exponent (bias 7), 3 of mantissa. To the nearest, ties to the even code; what is larger
    than 448 becomes 448."""
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
    """16-bit numbers to e4m3 codes. By table: several times faster than the arithmetic, and the same."""

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
    """`amax.json`: the largest |input| of each linear layer, by Hugging Face's name without `.weight`."""

    num_prompts: int
    inputs: dict[str, float]

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_bytes(pretty_json(asdict(self)))

    @classmethod
    def load(cls, path: Path, shape: LlamaShape) -> "Amax":
        """ValueError unless it has one positive number for every linear layer of the model."""
        found = read_json(path)
        inputs = found.get("inputs")
        if not isinstance(inputs, dict):
            raise ValueError(f"{path} has no `inputs`: it was not written by a calibration")
        wanted = set(linear_names(shape))
        if inputs.keys() != wanted:
            some = sorted(wanted ^ inputs.keys())[:3]
            raise ValueError(f"{path} is not of this model: {', '.join(some)} are in one and not in the other")
        for name, value in inputs.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{path}: {name} has {value}: calibrate again")
        return cls(found["num_prompts"], inputs)


def outgrown(reference: Amax, probe: Amax, margin: float) -> dict[str, float]:
    """The layers whose inputs in a probe of few prompts are larger than `margin` times those of the calibration, and
    by how much: with any of them, calibrate again."""
    ratios = {name: value / reference.inputs[name] for name, value in probe.inputs.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio > margin}


def linear_names(shape: LlamaShape) -> Iterator[str]:
    """The layers that FP8 is for."""
    for layer in range(shape.num_layers):
        for members in GROUPS.values():
            for member in members:
                yield f"model.layers.{layer}.{member}"


@dataclass(frozen=True)
class Scales:
    """Scales of weights and of activations, by the linear layer's name in Hugging Face's words."""

    weights: Mapping[str, float]
    inputs: Mapping[str, float]


def group_of(linear: str) -> tuple[int, str]:
    """(layer, group) of a linear layer by Hugging Face's name."""
    layer, member = linear.removeprefix("model.layers.").split(".", 1)
    return int(layer), next(group for group, members in GROUPS.items() if member in members)


def shared_scales(largest: Mapping[str, float]) -> dict[str, float]:
    """Return a scale for each linear layer: the largest number of its group / 448, so 1 for a group of zeros."""
    per_group: dict[tuple[int, str], float] = {}
    for linear, value in largest.items():
        group = group_of(linear)
        per_group[group] = max(value, per_group.get(group, 0.0))
    scales = {group: float(np.float32(value) / np.float32(LARGEST)) or 1.0 for group, value in per_group.items()}
    return {linear: scales[group_of(linear)] for linear in largest}


def weight_amax(source: Checkpoint, dtype: DType, report: Report) -> dict[str, float]:
    """The largest |w| of every linear layer, as a number of `dtype`, in one pass over the weights."""
    with Reader(source) as reader:
        for linear in linear_names(source.shape):
            for block in reader.blocks(f"{linear}.weight", MAX_BLOCK_BYTES):
                report(block.nbytes)
        return largest_weights(source, dtype, reader, linear_names(source.shape))


def largest_weights(source: Checkpoint, dtype: DType, reader: Reader, linears: Iterable[str]) -> dict[str, float]:
    """Of tensors whose rows a reader has read."""
    return {linear: _number(reader.largest[f"{linear}.weight"], source.dtype, dtype) for linear in linears}


def _number(bits: int, source: DType, dtype: DType) -> float:
    one = cast(np.array([bits], source.storage), source, dtype)
    return float(to_float32(one, dtype)[0])
