"""Random weights: names, sizes and scales."""

import pytest
import torch

from srlm_mega.checkpoints_conversion.llama import LlamaShape, huggingface_shapes
from srlm_mega.checkpoints_conversion.random_weights import random_weights

SHAPE = LlamaShape(8, 64, 128, 4, 2, 100, 16, 1e-5, 10000.0)


def test_scales() -> None:
    """std 0.02, and 0.02 / sqrt(2 * 8) = 0.005 for what writes into the residual stream; norms are one."""
    weights = random_weights(SHAPE, 0.02, torch.Generator().manual_seed(0))
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == huggingface_shapes(SHAPE)
    for name, tensor in weights.items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones(64))
        else:
            narrow = "o_proj" in name or "down_proj" in name
            assert tensor.std().item() == pytest.approx(0.005 if narrow else 0.02, rel=0.1), name


def test_the_seed_decides() -> None:
    first, again, other = (random_weights(SHAPE, 0.02, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
