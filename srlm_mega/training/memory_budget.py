"""The memory that training always needs in a process: weights, gradients and optimizer state, before they are made.

Activations, communication buffers and libraries come on top: what is refused cannot fit, what passes still may not.
"""

from dataclasses import dataclass

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.checkpoints_conversion.placement import Placement
from srlm_mega.config.model_sizes import GIB, GRADIENT_BYTES, optimizer_bytes, sizes_of, weight_bytes
from srlm_mega.errors import UserError


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes of one process that has `parameters` parameters of the model."""

    parameters: int
    bf16: bool
    optimizer_shards: int  # processes that share the optimizer's state: 1, or DP * CP with the distributed optimizer

    @property
    def weights(self) -> int:
        """Bytes of the weights, bf16 or fp32."""
        return self.parameters * weight_bytes(self.bf16)

    @property
    def gradients(self) -> int:
        """Bytes of the fp32 buffer in which micro batches accumulate gradients."""
        return self.parameters * GRADIENT_BYTES

    @property
    def optimizer(self) -> int:
        """Bytes of this process's share of Adam's state."""
        return self.parameters * optimizer_bytes(self.bf16) // self.optimizer_shards

    @property
    def total(self) -> int:
        """Bytes of weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    def __str__(self) -> str:
        terms = (
            ("weights", f"{weight_bytes(self.bf16)} bytes", self.weights),
            ("gradients", f"{GRADIENT_BYTES} bytes", self.gradients),
            ("optimizer", f"{optimizer_bytes(self.bf16)} bytes / {self.optimizer_shards} processes", self.optimizer),
        )
        sums = " + ".join(f"{what} * {each} {size / GIB:.2f} GiB" for what, each, size in terms)
        return f"{self.parameters:,} parameters per process: {sums} = {self.total / GIB:.2f} GiB"

    def check(self, available: int, where: str) -> None:
        """Raise UserError, with the arithmetic, when it is more than `available` bytes."""
        if self.total > available:
            raise UserError(
                f"{self}, more than the {available / GIB:.2f} GiB that {where} has for each process: raise "
                "tensor_model_parallel_size or pipeline_model_parallel_size, or set use_distributed_optimizer "
                "and raise data parallelism"
            )


def num_parameters(shape: LlamaShape, placement: Placement) -> int:
    """Return the number of parameters of one model chunk on one tensor-parallel rank."""
    first, last = placement.first_stage, placement.last_stage
    return int(sizes_of(shape).parameters_on_rank(len(placement.layers), placement.tp_size, first, last))
