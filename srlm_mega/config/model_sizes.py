"""Sizes that follow from a model's shape: parameters, floating point operations (FLOP) and bytes; for the trainer's
memory budget and MFU, the planner, and the disk that a run needs.

Model FLOP are forward and backward, for a dense decoder 6 * [L * (2 h^2 (1 + kv/heads) + 3 h ffn) + h V + a L h s] per
token: a = 2 counts full attention (megatron-core up to 0.11, NeMo's tables up to 25.07), a = 1 causal attention
(megatron-core from 0.12, Megatron-Bridge), a = 0 matrices only (NeMo 24.07's fine-tuning tables). Figures of different
conventions cannot be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from srlm_mega.checkpoints_conversion.llama import LlamaShape

GIB = 1 << 30
GRADIENT_BYTES = 4  # of each parameter: fp32 whatever the weights are
CAUSAL = 1.0  # a


@dataclass(frozen=True)
class ModelSizes:
    """Shape of a dense decoder, in Megatron's names. `gated`: SwiGLU with three matrices; otherwise two (GPT,
    Nemotron)."""

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int  # key/value heads
    vocab: int
    gated: bool = True
    head_size: int | None = None  # none: hidden / heads
    tied: bool = False

    @property
    def query_size(self) -> int:
        """Number of columns of the queries, of all heads."""
        return self.heads * (self.head_size or self.hidden // self.heads)

    @property
    def kv_size(self) -> int:
        """Number of columns of the keys, and of the values."""
        return self.query_size * self.groups // self.heads

    @property
    def mlp_inputs(self) -> int:
        """Number of columns of the MLP's first matrix."""
        return (2 if self.gated else 1) * self.ffn

    @property
    def layer_matrices(self) -> tuple[tuple[int, int, bool], ...]:
        """The matrices of a layer, each as (inputs, outputs, True where TP splits the outputs)."""
        return (
            (self.hidden, self.query_size + 2 * self.kv_size, True),
            (self.query_size, self.hidden, False),
            (self.hidden, self.mlp_inputs, True),
            (self.ffn, self.hidden, False),
        )

    @property
    def layer_parameters(self) -> int:
        """Number of parameters of one layer's matrices; norms come on top."""
        return sum(inputs * outputs for inputs, outputs, _ in self.layer_matrices)

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return int(self.parameters_on_rank(self.num_layers, tp_size=1, first=True, last=True))

    def parameters_on_rank(self, layers: float, tp_size: int, first: bool, last: bool) -> float:
        """Return the number of parameters of `layers` layers on one tensor-parallel rank, with the embedding (`first`
        pipeline stage), the last norm and the output (`last`). Matrices are split, norms held whole, the vocabulary
        padded to a multiple of `tp_size`."""
        layer = self.layer_parameters / tp_size + 2 * self.hidden
        vocabulary = -(-self.vocab // tp_size) * self.hidden
        output = last and not (first and self.tied)
        return layers * layer + (first + output) * vocabulary + last * self.hidden


def sizes_of(shape: LlamaShape) -> ModelSizes:
    """Return a checkpoint's shape as the record that counts parameters, FLOP and bytes."""
    return ModelSizes(
        num_layers=shape.num_layers,
        hidden=shape.hidden_size,
        ffn=shape.ffn_hidden_size,
        heads=shape.num_attention_heads,
        groups=shape.num_query_groups,
        vocab=shape.vocab_size,
        tied=shape.tie_word_embeddings,
    )


def weight_bytes(bf16: bool) -> int:
    """Return the bytes of each parameter's weight, in bf16 or fp32."""
    return 2 if bf16 else 4


def optimizer_bytes(bf16: bool) -> int:
    """Return the bytes of each parameter's optimizer state: two fp32 moments of Adam, an fp32 copy of bf16 weights."""
    return 8 + (4 if bf16 else 0)


def linear_flops_per_token(sizes: ModelSizes) -> int:
    """Return the FLOP of all matrices for one token: 6 per weight (2 forward, 4 backward)."""
    return 6 * (sizes.num_layers * sizes.layer_parameters + sizes.hidden * sizes.vocab)


def attention_flops(sizes: ModelSizes, lengths: Sequence[float], convention: float = CAUSAL) -> float:
    """Return the FLOP of attention's two products over sequences of these lengths, in tokens."""
    return 6 * convention * sizes.num_layers * sizes.query_size * sum(length * length for length in lengths)


def train_flops(sizes: ModelSizes, lengths: Sequence[int]) -> float:
    """Return the FLOP of a batch of sequences with these input lengths, in tokens, with causal attention."""
    return linear_flops_per_token(sizes) * sum(lengths) + attention_flops(sizes, lengths)


def flops_per_token(sizes: ModelSizes, seq_length: float, convention: float = CAUSAL) -> float:
    """Return the FLOP per token of whole sequences of `seq_length` tokens."""
    return linear_flops_per_token(sizes) + attention_flops(sizes, [seq_length], convention) / seq_length
