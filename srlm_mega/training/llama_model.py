"""Megatron's GPTModel with a head that returns log-probabilities of chosen rows, never [tokens, vocabulary] logits."""

from dataclasses import replace
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_pg_rank
from torch import Tensor, nn

from srlm_mega.kernels.ops import vp_linear_logprob
from srlm_mega.training.attention_sdpa import PackedSequences


class LogprobHead(ColumnParallelLinear):  # type: ignore[misc]
    """The output layer: weight [padded V / tp, h], of which `real_vocab_size` tokens over all ranks are real.

    It is a subclass of Megatron's layer, as checkpoints, tied embeddings and the parameter all-gather before its
    forward pass expect.
    """

    def __init__(self, *arguments: Any, real_vocab_size: int, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.real_vocab_size = real_vocab_size

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """Return log p [N] in fp32 from hidden states [s, b, h] and labels [2, N] (rows of the flattened [s * b, h],
        tokens), or, without labels, what Megatron's layer returns: logits."""
        if labels is None:
            logits: tuple[Tensor, None] = super().forward(input_, weight, runtime_gather_output)
            return logits
        own = self.weight if weight is None else weight
        vocab_start = get_pg_rank(self.tp_group) * len(own)
        if vocab_start + len(own) > self.real_vocab_size:  # the softmax is over real tokens only
            own = own[: self.real_vocab_size - vocab_start]
        rows, tokens = labels
        return vp_linear_logprob(
            input_.flatten(0, 1),
            own,
            tokens,
            rows,
            vocab_start=vocab_start,
            tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
        )


class LlamaModel(GPTModel):  # type: ignore[misc]
    """A GPTModel whose last pipeline stage returns log p [N] for labels [2, N]."""

    def __init__(self, *arguments: Any, real_vocab_size: int, **settings: Any) -> None:
        self.real_vocab_size = real_vocab_size
        super().__init__(*arguments, **settings)

    def setup_embeddings_and_output_layer(self) -> None:
        """Make the output layer a LogprobHead. Megatron calls this before it ties the layer and marks parameters."""
        if self.post_process:
            self.output_layer = LogprobHead(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                tp_group=self.pg_collection.tp,
                real_vocab_size=self.real_vocab_size,
            )
        super().setup_embeddings_and_output_layer()

    def forward(self, *inputs: Any, packed_seq_params: PackedSequences | None = None, **others: Any) -> Tensor:
        """Return Megatron's output. For layers of plain PyTorch a pack is one row, whose sequences only positions and
        attention tell apart: so Megatron reads no bounds of sequences, for which the host would wait on a GPU."""
        if packed_seq_params is not None and self.config.backend.layers == "torch":
            packed_seq_params = replace(packed_seq_params, qkv_format="sbhd")  # type: ignore[call-arg]
        output: Tensor = super().forward(*inputs, packed_seq_params=packed_seq_params, **others)
        return output

    def _preprocess(
        self, *, position_ids: Tensor, packed_seq_params: PackedSequences | None, **others: Any
    ) -> tuple[Any, ...]:
        hidden_states, rotary_pos_emb, *rest = super()._preprocess(
            position_ids=position_ids, packed_seq_params=packed_seq_params, **others
        )
        if packed_seq_params is not None and packed_seq_params.qkv_format == "sbhd":
            rotary_pos_emb = rotary_pos_emb.index_select(0, position_ids[0])
        return hidden_states, rotary_pos_emb, *rest

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, **others: Any) -> Tensor:
        if labels is None or not self.post_process:
            output: Tensor = super()._postprocess(hidden_states=hidden_states, labels=None, **others)
            return output
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logps: Tensor = self.output_layer(hidden_states, weight=weight, labels=labels)
        return logps


def unwrap(chunk: nn.Module) -> LlamaModel:
    """Return the LlamaModel inside its data-parallel and bf16 wrappers."""
    while isinstance(chunk, DistributedDataParallel | Float16Module):
        chunk = chunk.module
    assert isinstance(chunk, LlamaModel), f"expected a LlamaModel, found {type(chunk).__name__}"
    return chunk
