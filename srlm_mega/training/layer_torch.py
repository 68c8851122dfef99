"""Llama's layer for Megatron in plain PyTorch, for machines without Transformer Engine, and the block of both.

Megatron's own norm refuses sequence parallelism without Transformer Engine, and its own attention spells the
softmax out; both are replaced through the layer spec, Megatron's extension point. Its linears are kept: where they ask
for apex's kernel of weight gradients, they get ours.
"""

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from srlm_mega.kernels.weight_gradient import add_product
from srlm_mega.training.attention_sdpa import SdpaAttention

# Transformer Engine fuses each norm into the linear after it: the prefix of its parameters here, and there.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, computed in fp32 as Llama does.

    With selective recompute its input and its output alone are kept for the backward pass: no fp32 copy of the input,
    and no normalized values before the weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps, self.recompute = eps, config.recompute_granularity == "selective"
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each rank sees its part of the sequence only: Megatron sums marked gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize hidden states [s, b, h]."""
        if self.recompute:
            return checkpoint(self._normalized, hidden, use_reentrant=False, preserve_rng_state=False)
        return self._normalized(hidden)

    def _normalized(self, hidden: Tensor) -> Tensor:
        return self.weight * F.rms_norm(hidden.float(), (hidden.size(-1),), eps=self.eps).to(hidden.dtype)


class InPlaceOfApex:
    """In place of apex's extension `fused_weight_gradient_mlp_cuda`, what Megatron's linears call of it."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """Add a weight's gradient to its fp32 buffer [out, in]: inputs [n, in], gradient of the outputs [n, out]."""
        add_product(main_grad, grad_output, inputs)


def use_without_apex() -> None:
    """Let Megatron's linears add weight gradients to their fp32 buffers where apex is not installed."""
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = InPlaceOfApex
        layers._grad_accum_fusion_available = True


def unfused_name(name: str) -> str:
    """Return a parameter's name in these layers, from its name in these or in Transformer Engine's."""
    for plain, fused in FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def torch_block(num_layers: int, core_attention: type[SdpaAttention]) -> TransformerBlockSubmodules:
    """Return the block of one model chunk in plain PyTorch: `num_layers` Llama layers and the final norm."""
    use_without_apex()
    return llama_block(num_layers, ColumnParallelLinear, RowParallelLinear, core_attention, RMSNorm, RMSNorm)


def llama_block(
    num_layers: int,
    column: type[nn.Module],
    row: type[nn.Module],
    core_attention: type[nn.Module],
    layer_norm: type[nn.Module],
    final_norm: type[nn.Module],
) -> TransformerBlockSubmodules:
    """Return the block of one model chunk, of these parts; `layer_norm` is IdentityOp where `column` has the norm."""
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=core_attention,
        linear_proj=row,
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=layer_norm,
        self_attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=layer_norm,
        mlp=ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=FUSED_NORMS,  # both kinds of layer save the same tensors, and resume each other's
    )
    layer = ModuleSpec(TransformerLayer, submodules=submodules)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)
