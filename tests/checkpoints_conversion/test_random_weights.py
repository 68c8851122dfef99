"""Random weights: names, sizes and scales."""

import pytest
import torch

from srlm_mega.checkpoints_conversion.llama import LlamaShape, huggingface_shapes
from srlm_mega.checkpoints_conversion.random_weights import LazyRandomWeights, random_weights

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


def test_lazy_weights_do_not_depend_on_who_asks() -> None:
    one, two = (LazyRandomWeights(SHAPE, 0.02, 7, torch.device("cpu")) for _ in range(2))
    names = list(huggingface_shapes(SHAPE))
    forwards, backwards = {name: one[name] for name in names}, {name: two[name] for name in reversed(names)}
    assert list(one) == names and len(one) == len(names)
    assert all(torch.equal(forwards[name], backwards[name]) for name in names)
    assert not torch.equal(one["lm_head.weight"], one["model.embed_tokens.weight"])
    assert one["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(
        one["lm_head.weight"], LazyRandomWeights(SHAPE, 0.02, 8, torch.device("cpu"))["lm_head.weight"]
    )
