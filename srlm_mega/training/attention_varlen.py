"""Causal attention by the FlashAttention in PyTorch itself: one call for all packed sequences (16-bit, CUDA).

The call is the operator under `torch.nn.attention.varlen.varlen_attn`. That function has no dropout, and each of
PyTorch 2.10, 2.11 and 2.12 has other arguments. This has not been run on a GPU.
"""

import torch
from torch import Tensor

from srlm_mega.training.attention_sdpa import PackedSequences, SdpaAttention

flash_attention = torch.ops.aten._flash_attention_forward


class VarlenAttention(SdpaAttention):
    """Causal attention with the mathematics and shapes of SdpaAttention; packed sequences take one call."""

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences | None, dropout: float
    ) -> Tensor:
        if packed is None or query.size(-1) % 8 > 0:  # scaled_dot_product_attention pads heads of other sizes
            return super()._attend(query, key, value, packed, dropout)
        bounds = (packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv)
        context: Tensor = flash_attention(
            query, key, value, *bounds, dropout, is_causal=True, return_debug_mask=False, scale=self.softmax_scale
        )[0]
        return context
