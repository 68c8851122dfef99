"""Rates of training: tokens/s, floating point operations (FLOP) per second, and their share of the peak (MFU).

FLOP are those of the model, forward and backward, by the causal convention: attention costs a token half the sequence
(a = 1 in config/model_sizes.py; a = 2 counts what a causal mask discards). Padding and activation recompute are not
counted; the output layer is counted for every input. Rates and MFU of different conventions cannot be compared, so the
keys name this one: `TFLOP/s/GPU_causal`, `MFU_causal`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.config.model_sizes import sizes_of, train_flops


@dataclass(frozen=True)
class Meter:
    """The computation of rates and MFU from optimizer steps and their seconds. On a CPU a "GPU" is a process."""

    shape: LlamaShape
    world_size: int
    peak_tflops: float | None  # of one device

    def measure(self, lengths: Sequence[int], num_positions: int, seconds: float) -> dict[str, float]:
        """Return one step's metrics: `lengths` are the tokens of each sequence of the global batch, of which the last
        is only predicted; `num_positions` are computed by the model, padding included."""
        inputs = [length - 1 for length in lengths]
        useful = sum(inputs)
        assert 0 < useful <= num_positions, f"{useful} input tokens in {num_positions} positions"
        tflops = train_flops(sizes_of(self.shape), inputs) / 1e12 / seconds / self.world_size
        metrics = {
            "tokens/s/GPU": num_positions / seconds / self.world_size,
            "useful_tokens/s/GPU": useful / seconds / self.world_size,
            "TFLOP/s/GPU_causal": tflops,
        }
        return metrics if self.peak_tflops is None else metrics | {"MFU_causal": tflops / self.peak_tflops}
