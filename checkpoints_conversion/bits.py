"""Number formats as bits in numpy, which has no bfloat16: names, exact casts, a check for NaN and infinity."""

from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.unsignedinteger[Any]]


class DType(Enum):
    """A number format. The value is its name in safetensors."""

    FLOAT32 = "F32"
    FLOAT16 = "F16"
    BFLOAT16 = "BF16"
    FLOAT8_E4M3 = "F8_E4M3"

    @property
    def torch_name(self) -> str:
        """Name in torch and in a model's config, such as `bfloat16`."""
        return {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}[self.value]

    @property
    def storage(self) -> np.dtype[Any]:
        """Unsigned integers that hold the bits."""
        return np.dtype(f"<u{self.itemsize}")

    @property
    def itemsize(self) -> int:
        """Size of one number, in bytes."""
        return {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}[self.value]


_INFINITY = {DType.FLOAT32: 0x7F800000, DType.FLOAT16: 0x7C00, DType.BFLOAT16: 0x7F80}


def dtype_named(name: str) -> DType:
    """Return the format with a torch name such as `bfloat16`. ValueError for an unknown one."""
    dtypes = {dtype.torch_name: dtype for dtype in DType}
    if name not in dtypes:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(dtypes)}")
    return dtypes[name]


def largest_magnitude(bits: Bits, dtype: DType) -> int:
    """Return the bits of the largest |x|. They are ordered as the numbers are, with infinity and NaN on top.

    Two reductions without a temporary: the largest positive number is the largest signed integer, the largest negative
    one the largest unsigned integer.
    """
    if bits.size == 0:
        return 0
    sign = 1 << (8 * dtype.itemsize - 1)
    positive = int(bits.view(f"<i{dtype.itemsize}").max())
    largest = int(bits.max())
    return max(positive, largest - sign if largest >= sign else 0)


def is_finite(magnitude: int, dtype: DType) -> bool:
    """Tell whether `largest_magnitude` found finite numbers only, and neither infinity nor NaN."""
    return magnitude < _INFINITY[dtype]


def to_float32(bits: Bits, dtype: DType) -> NDArray[np.float32]:
    """Return the numbers that bits stand for, exactly. ValueError for FP8."""
    match dtype:
        case DType.FLOAT32:
            return bits.view(np.float32)
        case DType.FLOAT16:
            return bits.view(np.float16).astype(np.float32)
        case DType.BFLOAT16:
            return (bits.astype("<u4") << np.uint32(16)).view(np.float32)
        case DType.FLOAT8_E4M3:
            raise ValueError("FP8 weights are numbers only with their scale")


def from_float32(numbers: NDArray[np.float32], dtype: DType) -> Bits:
    """Round to nearest, ties to even, as torch does; what does not fit becomes infinity. ValueError for FP8."""
    bits: Bits = np.ascontiguousarray(numbers).view("<u4")
    match dtype:
        case DType.FLOAT32:
            return bits
        case DType.FLOAT16:
            with np.errstate(over="ignore"):
                return numbers.astype(np.float16).view("<u2")
        case DType.BFLOAT16:
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype("<u2")
        case DType.FLOAT8_E4M3:
            raise ValueError("FP8 weights need a scale: see fp8.py")


def cast(bits: Bits, source: DType, target: DType) -> Bits:
    """Convert bits of one format to those of another. ValueError when a finite number becomes infinite."""
    if source is target:
        return bits
    result = from_float32(to_float32(bits, source), target)
    if not is_finite(largest_magnitude(result, target), target):
        raise ValueError(f"values too large for {target.torch_name}: keep {source.torch_name} or take bfloat16")
    return result
