"""Llama's layer of Transformer Engine: norms fused into the linears behind them, FP8, its attention.

This has not been run on a GPU.
"""

import os

import transformer_engine.pytorch  # noqa: F401  without it Megatron's classes are empty shells
from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TELinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import nn

from srlm_mega.training.layer_torch import llama_block

# Delayed scales are pickled in a checkpoint, and newer versions refuse to read them back without it. checkpoint.py
# has looked at them before.
os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"


def engine_block(num_layers: int) -> TransformerBlockSubmodules:
    """Return the block of one model chunk: `num_layers` Llama layers of Transformer Engine and the final norm."""
    column, row = TELayerNormColumnParallelLinear, TERowParallelLinear  # the first one has the norm before it
    return llama_block(num_layers, column, row, TEDotProductAttention, IdentityOp, TENorm)


def fuse_weight_gradients(chunk: nn.Module) -> None:
    """Let the linears add weight gradients to their fp32 buffers themselves. Call it when the buffers exist.

    Megatron's switch for it also asks for apex, because of the output layer, which is not Transformer Engine's.
    """
    for module in chunk.modules():
        if isinstance(module, TELinear | TELayerNormColumnParallelLinear):
            module.fuse_wgrad_accumulation = True
