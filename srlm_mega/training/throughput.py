"""How fast training is: tokens, floating point operations (FLOP) and the share of what the device could do (MFU).

FLOP are those of the model, forward and backward, by the causal convention: attention costs a token half the sequence
(a = 1 below, megatron-core from 0.12 on; a = 2 counts what a causal mask throws away). Nothing is counted for padding,
nor for what activation recompute does again; the output layer is counted for every input. Rates and MFU of different
conventions cannot be compared, so the keys name this one: `TFLOP/s/GPU_causal`, `MFU_causal`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.config.training import TrainerConfig

Precision = Literal["fp32", "bf16", "fp8"]
CAUSAL = 1.0  # a: attention FLOP per token and layer are 6 * a * h * s

# Dense TFLOP/s (bf16, fp8) by the exact name that the driver gives: NVIDIA's data sheets, without sparsity. A name that
# is not here has no MFU: a slice of a device, or a variant with another power limit, is another device.
PEAK_TFLOPS: dict[str, tuple[float, float | None]] = {
    "NVIDIA A100-SXM4-40GB": (312.0, None),
    "NVIDIA A100-SXM4-80GB": (312.0, None),
    "NVIDIA A100-PCIE-40GB": (312.0, None),
    "NVIDIA A100 80GB PCIe": (312.0, None),
    "NVIDIA H100 80GB HBM3": (989.4, 1978.9),  # SXM
    "NVIDIA H100 PCIe": (756.0, 1513.0),
    "NVIDIA H100 NVL": (835.5, 1671.0),
    "NVIDIA H200": (989.4, 1978.9),  # SXM
    "NVIDIA H200 NVL": (835.5, 1671.0),
    "NVIDIA GH200 480GB": (989.4, 1978.9),
    "NVIDIA B200": (2250.0, 4500.0),
    "NVIDIA GB200": (2500.0, 5000.0),
}


def precision_of(trainer: TrainerConfig) -> Precision:
    """Of the matrix products."""
    if trainer.fp8 is not None:
        return "fp8"
    return "bf16" if trainer.bf16 else "fp32"


def peak_tflops(device_name: str | None, precision: Precision) -> float | None:
    """Dense peak of one device, None where it is not known (CPUs, other GPUs, fp32)."""
    peaks = PEAK_TFLOPS.get(device_name or "")
    if peaks is None:
        return None
    match precision:
        case "fp32":
            return None
        case "bf16":
            return peaks[0]
        case "fp8":
            return peaks[1]
        case _:
            assert_never(precision)


def linear_flops_per_token(shape: LlamaShape) -> float:
    """Forward and backward of all matrices for one token: 6 per weight (2 forward, 4 backward)."""
    h = shape.hidden_size
    attention = 2 * h * h * (1 + shape.num_query_groups / shape.num_attention_heads)
    mlp = 3 * h * shape.ffn_hidden_size
    return 6 * (shape.num_layers * (attention + mlp) + h * shape.vocab_size)


def attention_flops(shape: LlamaShape, lengths: Sequence[int], convention: float = CAUSAL) -> float:
    """Forward and backward of attention's two products, over sequences of these lengths that do not see each other."""
    return 6 * convention * shape.num_layers * shape.hidden_size * sum(length * length for length in lengths)


def train_flops(shape: LlamaShape, lengths: Sequence[int]) -> float:
    """Forward and backward of a batch of sequences with these input lengths, as defined on top."""
    return linear_flops_per_token(shape) * sum(lengths) + attention_flops(shape, lengths)


@dataclass(frozen=True)
class Meter:
    """Turns what an optimiser step worked on, and its seconds, into metrics. On a CPU a "GPU" is a process."""

    shape: LlamaShape
    world_size: int
    peak_tflops: float | None  # of one device

    def measure(self, lengths: Sequence[int], num_positions: int, seconds: float) -> dict[str, float]:
        """Metrics of one step over the whole global batch: `lengths` are the tokens of each sequence, of which the last
        is only predicted; `num_positions` is what went through the model, with padding."""
        inputs = [length - 1 for length in lengths]
        useful = sum(inputs)
        assert 0 < useful <= num_positions, f"{useful} input tokens in {num_positions} positions"
        tflops = train_flops(self.shape, inputs) / 1e12 / seconds / self.world_size
        metrics = {
            "tokens/s/GPU": num_positions / seconds / self.world_size,
            "useful_tokens/s/GPU": useful / seconds / self.world_size,
            "TFLOP/s/GPU_causal": tflops,
        }
        return metrics if self.peak_tflops is None else metrics | {"MFU_causal": tflops / self.peak_tflops}
