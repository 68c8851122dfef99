"""Causal attention by the package flash_attn (16-bit, CUDA). This has not been run on a GPU."""

from flash_attn import flash_attn_func, flash_attn_varlen_func
from torch import Tensor

from srlm_mega.training.attention_sdpa import PackedSequences, SdpaAttention


class FlashAttention(SdpaAttention):
    """Causal attention with the mathematics and shapes of SdpaAttention; packed sequences take one call."""

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences | None, dropout: float
    ) -> Tensor:
        if packed is None:
            q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
            padded: Tensor = flash_attn_func(q, k, v, dropout, self.softmax_scale, causal=True)
            return padded.transpose(0, 1)
        bounds = (packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv)
        context: Tensor = flash_attn_varlen_func(query, key, value, *bounds, dropout, self.softmax_scale, causal=True)
        return context
