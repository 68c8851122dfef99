"""Random weights of a shape, for models that are trained from nothing."""

import torch
from torch import Tensor

from srlm_mega.checkpoints_conversion.llama import LlamaShape, huggingface_shapes


def random_weights(shape: LlamaShape, std: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Hugging Face names, fp32: norms are 1, the rest normal with `std`; what writes into the residual stream is
    scaled down by sqrt(2 * layers), as GPT-2 and Megatron do."""
    weights = {}
    for name, size in huggingface_shapes(shape).items():
        if len(size) == 1:
            weights[name] = torch.ones(size)
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = std / (2 * shape.num_layers) ** 0.5 if residual else std
        weights[name] = torch.randn(size, generator=generator) * scale
    return weights
