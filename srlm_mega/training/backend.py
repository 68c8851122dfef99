"""The choice of the layers' implementation, by the configuration, the device and the installed packages.

The choices for CUDA have not been run on a GPU.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, assert_never

import torch
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import nn

from srlm_mega.config import Config
from srlm_mega.config.training import Fp8Recipe
from srlm_mega.errors import UserError
from srlm_mega.training import adamw
from srlm_mega.training.attention_sdpa import SdpaAttention
from srlm_mega.training.attention_varlen import VarlenAttention
from srlm_mega.training.context_parallel import ContextAttention
from srlm_mega.training.layer_torch import torch_block

APEX_KERNEL = "fused_weight_gradient_mlp_cuda"  # used where it is installed; else ours
FLASH_CAPABILITY = (8, 0)  # Ampere

Attention = Literal["transformer_engine", "flash_attn", "torch_varlen", "sdpa", "sdpa_of_gathered_keys"]


@dataclass(frozen=True)
class Backend:
    """The implementation of the layers, of attention and of fused kernels."""

    layers: Literal["transformer_engine", "torch"]
    attention: Attention
    fuse_elementwise: bool  # by torch.compile: dropout with its residual, SwiGLU
    fuse_weight_gradients: bool  # of torch layers: added to their fp32 buffers by the product, never rounded to bf16

    def __str__(self) -> str:
        package = "apex" if installed(APEX_KERNEL) else "torch"
        fused = {"elementwise": self.fuse_elementwise, f"weight gradients ({package})": self.fuse_weight_gradients}
        fused["rotary embedding, weight gradients (Transformer Engine)"] = self.layers == "transformer_engine"
        names = ", ".join(name for name, on in fused.items() if on) or "nothing"
        attention = self.attention + (" (a call per sequence, without cuDNN)" if self.attention == "sdpa" else "")
        return f"layers: {self.layers}; attention: {attention}; fused: {names}; Adam: {adamw.package()}"

    def settings(self) -> dict[str, Any]:
        """Return fields of Megatron's TransformerConfig."""
        return {
            "transformer_impl": "local" if self.layers == "torch" else "transformer_engine",
            "apply_rope_fusion": self.layers == "transformer_engine",
            "gradient_accumulation_fusion": self.fuse_weight_gradients,
            "bias_activation_fusion": self.fuse_elementwise,
            "bias_dropout_fusion": self.fuse_elementwise,
            "masked_softmax_fusion": False,  # of Megatron's own attention, which is not used
            "persist_layer_norm": False,  # of apex's LayerNorm; Llama has RMSNorm
            "cross_entropy_loss_fusion": False,  # rounds gradients to bf16
        }


def choose_backend(config: Config, device: torch.device) -> Backend:
    """Choose the backend; `auto` is Transformer Engine on CUDA where it is installed. UserError when a requested
    feature is not available."""
    wanted, on_cuda = config.model.layer_backend, device.type == "cuda"
    found = installed("transformer_engine")
    match wanted:
        case "torch":
            use_engine = False
        case "auto" | "transformer_engine":
            use_engine = on_cuda and found
        case _:
            assert_never(wanted)
    needed_by = [f"model.layer_backend={wanted}"] if wanted == "transformer_engine" else []
    needed_by += [f"trainer.fp8={config.trainer.fp8}"] if config.trainer.fp8 is not None else []
    if needed_by and not use_engine:
        raise UserError(
            f"{' and '.join(needed_by)}: Transformer Engine layers need a CUDA device (this is {device.type}) and "
            f"transformer_engine (it is {'installed' if found else 'not installed'}): pip install "
            "transformer-engine[pytorch] there, or use model.layer_backend=torch without trainer.fp8"
        )
    if config.trainer.fp8 is not None:
        check_capability(torch.cuda.get_device_capability(device), config.trainer.fp8_recipe)
    return Backend(
        layers="transformer_engine" if use_engine else "torch",
        attention="transformer_engine" if use_engine else choose_attention(config, device),
        fuse_elementwise=on_cuda,
        # On a CPU in fp32 nothing is rounded, and runs keep their bytes: there the sum would be of other roundings.
        fuse_weight_gradients=not use_engine and (on_cuda or config.trainer.bf16),
    )


def choose_attention(config: Config, device: torch.device) -> Attention:
    """Return the attention of plain PyTorch layers: FlashAttention, which takes all sequences of a pack in one call,
    where the device and the precision have it."""
    if config.parallel.context_parallel_size > 1:
        return "sdpa_of_gathered_keys"
    if device.type == "cuda" and config.trainer.bf16 and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY:
        return "flash_attn" if installed("flash_attn") else "torch_varlen"
    return "sdpa"


def block(backend: Backend, num_layers: int) -> TransformerBlockSubmodules:
    """Return `num_layers` Llama layers and the final norm."""
    # Imported only where it is chosen, so that the packages of the other backends need not be installed.
    match backend.attention:
        case "transformer_engine":
            from srlm_mega.training.layer_te import engine_block

            return engine_block(num_layers)
        case "flash_attn":
            from srlm_mega.training.attention_flash import FlashAttention

            return torch_block(num_layers, FlashAttention)
        case "torch_varlen":
            return torch_block(num_layers, VarlenAttention)
        case "sdpa":
            return torch_block(num_layers, SdpaAttention)
        case "sdpa_of_gathered_keys":
            return torch_block(num_layers, ContextAttention)
        case _:
            assert_never(backend.attention)


def fuse_gradients(backend: Backend, chunk: nn.Module) -> None:
    """Let Transformer Engine's linears add weight gradients to their buffers themselves. Call it when these exist."""
    if backend.layers == "transformer_engine":
        from srlm_mega.training.layer_te import fuse_weight_gradients

        fuse_weight_gradients(chunk)


def installed(package: str) -> bool:
    """Tell whether a package can be imported, without importing it."""
    return find_spec(package) is not None


def check_capability(found: tuple[int, int], recipe: Fp8Recipe) -> None:
    """Raise UserError on a device of this compute capability if Transformer Engine refuses the FP8 recipe there."""
    match recipe:
        case "delayed" | "tensorwise":
            least, below, range_ = (8, 9), (99, 0), "8.9 or more (Ada, Hopper, Blackwell)"
        case "blockwise":
            least, below, range_ = (9, 0), (99, 0), "9.0 or more (Hopper, Blackwell)"
        case "mxfp8":
            least, below, range_ = (10, 0), (12, 0), "10.0 to 11.x (Blackwell: B200, B300)"
        case _:
            assert_never(recipe)
    if not least <= found < below:
        instead = "fp8_recipe=tensorwise" if found >= (8, 9) else "fp8=null"
        raise UserError(
            f"trainer.fp8 with fp8_recipe={recipe} needs compute capability {range_}, this device has "
            f"{found[0]}.{found[1]}: set trainer.{instead}"
        )
