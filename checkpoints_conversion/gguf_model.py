"""GGUF models (llama.cpp's files) as matrices in a file. They are one more kind of source: quantised blocks are decoded
as they are read (`Encoding`), so that a conversion from them is divided, resumed and proved like any other."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType
from gguf.quants import dequantize
from gguf.tensor_mapping import get_tensor_name_map
from numpy.typing import NDArray

from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.gguf_header import GgufHeader, GgufTensor, read_header
from srlm_mega.checkpoints_conversion.gguf_vocabulary import Vocabulary
from srlm_mega.checkpoints_conversion.llama import LlamaShape, RopeScaling, check_size, huggingface_shapes
from srlm_mega.checkpoints_conversion.patches import Matrix, Patch, whole
from srlm_mega.checkpoints_conversion.reader import Checkpoint, Stored

KIND = "gguf"
ROPE_FACTORS = "rope_freqs.weight"
HEAD_SIZES = ("rope.dimension_count", "attention.key_length", "attention.value_length")
PLAIN: dict[str, float | str] = {  # what else these keys may say is not a plain Llama
    "expert_count": 0,
    "attention.sliding_window": 0,
    "rope.scaling.type": "none",
    "rope.scale_linear": 1.0,
}
LLAMA3 = [RopeScaling(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0)]  # the published ones
CONTEXTS = [2**power for power in range(4, 25)]
FACTOR_TOLERANCE = 2e-5  # of factors that were computed in fp32


@dataclass(frozen=True)
class GgmlBlocks:
    """Numbers in the blocks of a type of ggml."""

    kind: GGMLQuantizationType

    @property
    def name(self) -> str:
        """Name of the type, such as Q4_K."""
        return self.kind.name

    def nbytes(self, count: int) -> int:
        """Return the size of so many numbers, in bytes."""
        numbers, size = GGML_QUANT_SIZES[self.kind]
        return count // numbers * size

    def decode(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the numbers of rows of bytes. NotImplementedError for a type that the library cannot decode."""
        numbers: NDArray[np.float32] = dequantize(rows, self.kind)
        return numbers


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file. ValueError names what is missing, unknown, or not a plain Llama's.

    All numbers are read as float32, which rounds none. A conversion keeps the format of matrices that have one of
    DType's; quantised ones, and mixtures, stay float32.
    """
    header = read_header(path)
    shape = _read_shape(header)
    sizes = huggingface_shapes(shape)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, shape.num_layers)
    tensors = {name: header.tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight") for name in sizes}
    unknown = header.tensors.keys() - {tensor.name for tensor in tensors.values()} - {ROPE_FACTORS}
    if unknown:
        some = ", ".join(sorted(unknown)[:3])
        raise ValueError(f"{path} holds {len(unknown)} tensors that a plain Llama has not ({some}): use a plain Llama")
    stored = tuple(_stored(path, tensors[name], name, sizes[name], shape) for name in sizes)
    formats = {tensor.kind.name for tensor in tensors.values() if len(tensor.shape) > 1}
    kept = next((dtype for dtype in DType if formats == {dtype.value}), DType.FLOAT32)
    config = shape.to_huggingface() | Vocabulary.from_header(header).special_ids()
    return Checkpoint(path.parent, KIND, shape, config, DType.FLOAT32, stored, kept).check()


def _read_shape(header: GgufHeader) -> LlamaShape:
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{header.path}: its architecture is {architecture!r}, supported is 'llama': use a Llama")
    heads = _count(header, "attention.head_count")
    shape = LlamaShape(
        num_layers=_count(header, "block_count"),
        hidden_size=_count(header, "embedding_length"),
        ffn_hidden_size=_count(header, "feed_forward_length"),
        num_attention_heads=heads,
        num_query_groups=_count(header, "attention.head_count_kv", heads),
        vocab_size=header.tensor("token_embd.weight").shape[0],
        max_position_embeddings=_count(header, "context_length"),
        norm_epsilon=_decimal(_metadata(header, "attention.layer_norm_rms_epsilon")),
        rotary_base=_decimal(_metadata(header, "rope.freq_base", 10000.0)),
        tie_word_embeddings="output.weight" not in header.tensors,
    )
    sizes: dict[str, float | str] = dict.fromkeys(HEAD_SIZES, shape.kv_channels)
    for key, plain in (PLAIN | sizes).items():
        if (found := _metadata(header, key, plain)) != plain:
            raise ValueError(f"{header.path}: llama.{key} is {found!r}, supported is {plain!r}: use a plain Llama")
    return replace(shape, rope_scaling=_read_rope_scaling(header, shape))


def _metadata(header: GgufHeader, key: str, default: float | str | None = None) -> Any:
    value = header.metadata.get(f"llama.{key}", default)
    if value is None or isinstance(value, list):
        got = "missing" if value is None else "a list of values, one for each layer"
        raise ValueError(f"{header.path}: llama.{key} is {got}: use a plain Llama")
    return value


def _count(header: GgufHeader, key: str, default: int | None = None) -> int:
    value = _metadata(header, key, default)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{header.path}: llama.{key} is {value!r}, and should be a positive number: use a plain Llama")
    return value


def _decimal(number: float) -> float:
    """Return the shortest decimal number that is this one in fp32: 1e-05, and not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _read_rope_scaling(header: GgufHeader, shape: LlamaShape) -> RopeScaling | None:
    if ROPE_FACTORS not in header.tensors:
        return None
    tensor = header.tensors[ROPE_FACTORS]
    if tensor.kind is not GGMLQuantizationType.F32 or tensor.shape != (shape.kv_channels // 2,):
        raise ValueError(f"{header.path}: {ROPE_FACTORS} is no fp32 number for each pair of a head: use a plain Llama")
    factors = np.fromfile(header.path, "<f4", tensor.shape[0], offset=tensor.offset).astype(np.float64)
    if np.all(factors == 1):
        return None
    scaling = recover_rope_scaling(factors, shape.rotary_base)
    if scaling is None:
        raise ValueError(
            f"{header.path}: {ROPE_FACTORS} is not Llama 3's stretching of wave lengths, and no config.json could "
            "express it: use a plain Llama"
        )
    return scaling


def recover_rope_scaling(factors: NDArray[np.float64], rotary_base: float) -> RopeScaling | None:
    """Return Llama 3's scaling that has these factors [d / 2], or None. llama.cpp keeps only them, all that the model
    computes with. Where several scalings have them, the published ones and powers of two go first."""
    largest = float(factors.max())
    if not (factors.min() >= 1 and 1 < largest < math.inf):
        return None
    candidates = LLAMA3 + [RopeScaling(float(f"{largest:.6g}"), 1.0, 4.0, context) for context in CONTEXTS]
    # 0 where a wave is stretched fully, 1 where not at all; between them a straight line over 1 / wave length.
    unchanged = (1 / factors - 1 / largest) / (1 - 1 / largest)
    between = (unchanged > FACTOR_TOLERANCE) & (unchanged < 1 - FACTOR_TOLERANCE)
    if between.sum() > 1:
        line = np.polyfit(1 / rope_wave_lengths(len(factors), rotary_base)[between], unchanged[between], 1)
        slope, start = line.tolist()
        if start < 0 < slope:
            fitted = replace(candidates[-1], high_freq_factor=round(1 - 1 / start, 3))
            candidates.append(replace(fitted, original_max_position_embeddings=round(-slope / start)))
    for scaling in candidates:
        if np.allclose(rope_factors(scaling, len(factors), rotary_base), factors, rtol=FACTOR_TOLERANCE, atol=0):
            return scaling
    return None


def rope_wave_lengths(pairs: int, rotary_base: float) -> NDArray[np.float64]:
    """Return the wave length, in positions, of each pair of a head's rows: [pairs]."""
    lengths: NDArray[np.float64] = 2 * math.pi * rotary_base ** (np.arange(pairs) / pairs)
    return lengths


def rope_factors(scaling: RopeScaling, pairs: int, rotary_base: float) -> NDArray[np.float64]:
    """Return how many times longer Llama 3's scaling makes each pair's wave: [pairs], from 1 to `factor`."""
    turns = scaling.original_max_position_embeddings / rope_wave_lengths(pairs, rotary_base)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    unchanged = np.clip((turns - low) / (high - low), 0, 1)
    factors: NDArray[np.float64] = 1 / (unchanged + (1 - unchanged) / scaling.factor)
    return factors


def _stored(path: Path, tensor: GgufTensor, name: str, size: tuple[int, ...], shape: LlamaShape) -> Stored:
    check_size(tensor.name, tensor.shape, size, str(path))
    blocks = None if tensor.kind is GGMLQuantizationType.F32 else GgmlBlocks(tensor.kind)
    if blocks is not None:
        try:
            blocks.decode(np.zeros((1, GGML_QUANT_SIZES[tensor.kind][1]), np.uint8))
        except NotImplementedError:
            raise ValueError(
                f"{path}: {tensor.name} is of type {blocks.name}, which the Python library gguf cannot decode: "
                "take another file of this model, such as Q8_0"
            ) from None
    return Stored(tensor.name, path.name, tensor.offset, DType.FLOAT32, _matrix(name, size, shape), encoding=blocks)


def _matrix(name: str, size: tuple[int, ...], shape: LlamaShape) -> Matrix:
    """Describe a tensor as it lies in the file. llama.cpp rotates neighbouring rows of queries and keys together, where
    Hugging Face rotates rows i and i + d/2 of a head. Two of its rows, taken as one of double width, are these two."""
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_query_groups}.get(name.split(".")[-2])
    if heads is None:
        return whole(name, size)
    rows, columns = size
    half = rows // heads // 2
    patches = (
        Patch(name, (2 * head + side) * half, 0, head * half, side * columns, half, columns)
        for head in range(heads)
        for side in range(2)
    )
    return Matrix(rows // 2, 2 * columns, tuple(patches))
