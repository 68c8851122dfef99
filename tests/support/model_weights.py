"""A small Llama's shape and random weights."""

import torch
from torch import Tensor

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.checkpoints_conversion.random_weights import random_weights

SHAPE = LlamaShape(2, 32, 24, 4, 2, 20, 16, 1e-6, 5000.0)


def weights_of(shape: LlamaShape = SHAPE) -> dict[str, Tensor]:
    """Random weights, always the same."""
    return random_weights(shape, 0.3, torch.Generator().manual_seed(0))
