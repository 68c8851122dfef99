"""Selective recompute: what a norm keeps for its backward pass, and that the numbers stay."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srlm_mega.training.layer_torch import RMSNorm


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and nobody has freed."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.storages.update(one.untyped_storage() for one in tree_leaves(result) if isinstance(one, Tensor))
        return result

    @property
    def num_bytes(self) -> int:
        """Their sum."""
        return sum({storage._cdata: storage.nbytes() for storage in self.storages}.values())


def norm_of(recompute: str | None) -> RMSNorm:
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, params_dtype=torch.bfloat16)
    config.recompute_granularity = recompute
    return RMSNorm(config, 64, 1e-5)


def test_selective_recompute_keeps_of_a_norm_its_output_alone() -> None:
    """bf16 hidden states [24, 2, 64] are 6,144 bytes, and so is the output. Without recompute there are, too, the fp32
    copy of the input, twice that, the normalized values, and a statistic of 4 bytes for each of 48 rows. (The input is
    made by others: with recompute it is kept in place of its copy.)"""
    hidden = torch.randn(24, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    kept, gradients = [], []
    for recompute in (None, "selective"):
        norm = norm_of(recompute)
        with Alive() as alive:
            out = norm(hidden)
        kept.append(alive.num_bytes)
        gradients.append(torch.autograd.grad(out.square().sum(), (hidden, norm.weight)))
    assert kept == [4 * 6144 + 48 * 4, 6144]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
