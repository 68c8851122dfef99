"""What training keeps in a process's memory at all times: weights, gradients and optimizer state, before any are made.

Activations, communication buffers and the package's own memory come on top, so what passes may still not fit; what is
refused cannot.
"""

from dataclasses import dataclass

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.checkpoints_conversion.megatron import Placement
from srlm_mega.config.model_sizes import GIB, GRADIENT_BYTES, ModelSizes, optimizer_bytes, weight_bytes
from srlm_mega.errors import UserError


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes of one process that holds `parameters` of the model."""

    parameters: int
    bf16: bool
    optimizer_shards: int  # processes that share the optimizer's state: 1, or DP * CP with the distributed optimizer

    @property
    def weights(self) -> int:
        """bf16 or fp32."""
        return self.parameters * weight_bytes(self.bf16)

    @property
    def gradients(self) -> int:
        """The fp32 buffer that micro batches add to."""
        return self.parameters * GRADIENT_BYTES

    @property
    def optimizer(self) -> int:
        """This process's share of Adam's state."""
        return self.parameters * optimizer_bytes(self.bf16) // self.optimizer_shards

    @property
    def total(self) -> int:
        """All three."""
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
        """UserError, with the arithmetic, when `available` bytes cannot hold it."""
        if self.total > available:
            raise UserError(
                f"{self}, more than the {available / GIB:.2f} GiB that {where} has for each process: raise "
                "tensor_model_parallel_size or pipeline_model_parallel_size, or set use_distributed_optimizer "
                "and raise data parallelism"
            )


def num_parameters(shape: LlamaShape, placement: Placement) -> int:
    """Parameters of one model chunk on one tensor-parallel rank."""
    first, last = placement.first_stage, placement.last_stage
    return int(sizes_of(shape).parameters_on_rank(len(placement.layers), placement.tp_size, first, last))


def sizes_of(shape: LlamaShape) -> ModelSizes:
    """What a checkpoint's shape amounts to."""
    return ModelSizes(
        num_layers=shape.num_layers,
        hidden=shape.hidden_size,
        ffn=shape.ffn_hidden_size,
        heads=shape.num_attention_heads,
        groups=shape.num_query_groups,
        vocab=shape.vocab_size,
        tied=shape.tie_word_embeddings,
    )
