"""Context parallelism: each sequence cut in 2 * CP equal chunks, of which rank r holds the r-th from both ends.

So every rank has an early chunk, which attends to little, and a late one, which attends to much. Megatron's rotary
embedding and Transformer Engine's attention cut the same way. The attention here is that of the plain PyTorch layers:
every rank gathers all keys and values. It is simple rather than fast: K and V of the whole sequence are in each rank's
memory, and the mask keeps PyTorch from its fastest kernels. Transformer Engine passes them round instead.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from srlm_mega.kernels.collectives import gather_sequence
from srlm_mega.training.attention_sdpa import PackedSequences, SdpaAttention


def cp_positions(length: int, cp_rank: int, cp_size: int, device: torch.device | None = None) -> Tensor:
    """Return the positions that a rank holds, in the order in which it holds them: [length / cp_size]."""
    assert length % (2 * cp_size) == 0, f"{length} positions are not a multiple of 2 * CP {cp_size}"
    chunks = torch.arange(length, device=device).chunk(2 * cp_size)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


class ContextAttention(SdpaAttention):
    """Attention to the gathered keys and values; inputs and output are this rank's positions, [s / cp, b, ...]."""

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences | None, dropout: float
    ) -> Tensor:
        assert packed is None, "the configuration refuses packing under context parallelism"
        assert self.pg_collection is not None, "Megatron builds attention with its groups"
        group = self.pg_collection.cp
        size = group.size()
        length = len(query) * size
        held = torch.cat([cp_positions(length, rank, size, query.device) for rank in range(size)])
        own = cp_positions(length, group.rank(), size, query.device)
        q = query.permute(1, 2, 0, 3)
        k, v = (gather_sequence(tensor, group).permute(1, 2, 0, 3) for tensor in (key, value))
        past = held[None, :] <= own[:, None]
        context = F.scaled_dot_product_attention(q, k, v, past, dropout, scale=self.softmax_scale, enable_gqa=True)
        return context.permute(2, 0, 1, 3)
