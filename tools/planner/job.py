"""A training job: model, GPU, layout and batch, the planner's one input."""

from dataclasses import dataclass
from typing import Literal

from srlm_mega.config.model_sizes import ModelSizes
from srlm_mega.config.training import Precision
from srlm_mega.gpus import GpuModel

Recompute = Literal["none", "selective", "full"]
# What keeps how much for the backward pass (memory.py): plain PyTorch, Transformer Engine's modules, or layers that a
# compiler fuses, as torchtitan's and MaxText's.
Layers = Literal["torch", "transformer_engine", "compiled"]


@dataclass(frozen=True)
class Stack:
    """Ways in which a training framework differs, as it documents them."""

    name: str
    layers: Layers = "transformer_engine"
    flash2: bool = False  # attention by FlashAttention 2 in place of kernels made for Hopper (cuDNN, FlashAttention 3)
    overlaps_tensor_parallel: bool = True
    ring_in_blocks: bool = False  # context parallelism by torch: attention's blocks one by one, merged in fp32
    fused_loss: bool = False  # the softmax over the vocabulary in one kernel, which keeps no copies in fp32
    tuned: bool = False  # NVIDIA's software of 2025 and later: its kernels lose less
    gradient_bytes: int = 4  # in which gradients are summed
    selective_recompute: float = 0.0  # share of a layer's forward products that `selective` repeats
    # Megatron's `selective` repeats the attention core, of which flash attention keeps next to nothing: it costs time
    # and saves no memory. Ours repeats norms of torch layers.
    selective_attention: bool = True


MEGATRON = Stack("megatron")


@dataclass(frozen=True)
class ParallelLayout:
    """Megatron's axes. `fsdp`: ranks that share weights too (ZeRO 3), gathered for every micro batch."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    vpp: int = 1  # model chunks per pipeline stage
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    fsdp: int = 1
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True

    @property
    def gpus(self) -> int:
        """GPUs in all, the world size."""
        return self.model_parallel * self.dp

    @property
    def model_parallel(self) -> int:
        """GPUs of one replica."""
        return self.tp * self.pp * self.cp

    @property
    def row_shards(self) -> int:
        """Ranks that share a token's activations outside of the matrices: TP with sequence parallelism."""
        return self.tp if self.sequence_parallel else 1

    @property
    def optimizer_shards(self) -> int:
        """Ranks that share the optimizer's state."""
        return self.dp * self.cp if self.distributed_optimizer or self.fsdp > 1 else 1

    def __str__(self) -> str:
        axes = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp, "CP": self.cp, "DP": self.dp, "FSDP": self.fsdp}
        return " ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1) or "one GPU"


@dataclass(frozen=True)
class Job:
    """One optimiser step. Batches are in sequences, `seq_length` and `attended_length` in tokens."""

    shape: ModelSizes
    gpu: GpuModel
    layout: ParallelLayout
    precision: Precision
    micro_batch: int
    global_batch: int
    seq_length: int
    recompute: Recompute = "none"
    stack: Stack = MEGATRON
    current_scaling: bool = False  # FP8 scales from the tensor itself: one more pass over it
    frozen: bool = False  # LoRA: no gradients of the weights
    gradient_bytes: int = 4
    fp8_weights: bool = False  # Megatron's fp8_param_gather: no bf16 copy of the weights next to the FP8 ones
    attended_length: int | None = None  # packed sequences see only themselves; None: seq_length
    head_rows: float = 1.0  # share of the positions whose log-probabilities are wanted
    hidden_dropout: bool = False
    eager: bool = False  # on a CPU, where nothing fuses dropout, SwiGLU and the sequences of a packed row
    fused_head: bool = False  # log-probabilities in chunks (kernels/ops.py) in place of whole logits

    def __post_init__(self) -> None:
        if self.precision == "fp8":
            self.gpu.require_fp8()

    @property
    def micro_batches(self) -> float:
        """Micro batches per step and replica."""
        return max(1.0, self.global_batch / (self.micro_batch * self.layout.dp))

    @property
    def repeated_products(self) -> float:
        """Share of a layer's forward products that the backward pass does again."""
        return {"none": 0.0, "selective": self.stack.selective_recompute, "full": 1.0}[self.recompute]

    @property
    def repeats_attention(self) -> bool:
        """True where the backward pass does attention's forward pass again."""
        selective = self.stack.selective_attention and self.stack.selective_recompute == 0
        return self.recompute == "full" or (self.recompute == "selective" and selective)

    @property
    def local_tokens(self) -> float:
        """Tokens of one micro batch on a context-parallel rank."""
        return self.micro_batch * self.seq_length / self.layout.cp

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a step over the whole job."""
        return self.global_batch * self.seq_length
