"""What layers keep in memory on a GPU, for tensors on a CPU that have no contents.

Where the trainer's own code takes other operations on CUDA than on a CPU, a stand-in allocates and saves what the
operation there does, and computes nothing: RMSNorm, dropout, SwiGLU, the head's Triton kernels. Attention is torch's
own operator for CUDA, which needs no stand-in where nothing has contents.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from megatron.core.fusions import fused_bias_dropout, fused_bias_swiglu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from srlm_mega.config import Config
from srlm_mega.gpus import GpuModel
from srlm_mega.tools.rehearsal.watch import StepWatch
from srlm_mega.training.backend import Backend, choose_backend, installed


def backend_on(gpu: GpuModel, config: Config) -> Backend:
    """Return the backend that the job chooses on such a GPU with the packages that are installed here. FlashAttention
    by its own package keeps what the one in torch does."""
    with patch.object(torch.cuda, "get_device_capability", lambda device=None: gpu.capability):
        chosen = choose_backend(config, torch.device("cuda"))
    return replace(chosen, attention="torch_varlen") if chosen.attention == "flash_attn" else chosen


class RmsNormStandIn(torch.autograd.Function):
    """aten._fused_rms_norm on CUDA: it keeps its input and one fp32 number per row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        """Return a result of the input's shape [..., h]."""
        ctx.save_for_backward(hidden, hidden.new_empty((*hidden.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Return a gradient of the input's shape."""
        return torch.empty_like(ctx.saved_tensors[0])


class DropoutAddStandIn(torch.autograd.Function):
    """Megatron's compiled bias_dropout_add without a bias: it keeps the dropout's mask, one byte per number."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, residual: Tensor, probability: float) -> Tensor:
        """Return a result of the residual's shape."""
        ctx.drops = probability > 0
        if ctx.drops:
            ctx.save_for_backward(torch.empty_like(hidden, dtype=torch.bool))
        return torch.empty_like(residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return gradients of both inputs' shapes."""
        return torch.empty_like(grads[0]) if ctx.drops else grads[0], grads[0], None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stand in for F.scaled_dot_product_attention with the operator that it takes on CUDA: FlashAttention, which has no
    masks, the memory-efficient one, which has no grouped queries, or the plain one, which keeps every score."""
    arguments = query, key, value
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(*arguments, dropout_p, is_causal, scale=scale)[0]
    if not enable_gqa or query.size(1) == key.size(1):
        bias = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.size(2))
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(*arguments, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]
    plain = torch.ops.aten._scaled_dot_product_attention_math
    return plain(*arguments, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True)[0]


def rms_norm(hidden: Tensor, shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Stand in for F.rms_norm without a weight."""
    assert weight is None, "the layers multiply by their weight themselves"
    result: Tensor = RmsNormStandIn.apply(hidden)
    return result


def dropout(hidden: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Stand in for F.dropout, which on CUDA keeps a mask of one byte per number, on a CPU one of the input's dtype."""
    return torch.native_dropout(hidden, p, training)[0] if training and p > 0 else hidden


def dropout_add(hidden_and_bias: tuple[Tensor, None], residual: Tensor, probability: float) -> Tensor:
    """Stand in for bias_dropout_add_fused_train."""
    hidden, bias = hidden_and_bias
    assert bias is None, "Llama has no biases"
    result: Tensor = DropoutAddStandIn.apply(hidden, residual, probability)
    return result


def dropout_add_in_inference(hidden_and_bias: tuple[Tensor, None], residual: Tensor, probability: float) -> Tensor:
    """Stand in for bias_dropout_add_fused_inference, which without gradients adds in place."""
    return hidden_and_bias[0] if not torch.is_grad_enabled() else dropout_add(hidden_and_bias, residual, 0.0)


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Stand in for the compiled SwiGLU: [..., 2 * f] to [..., f] in one kernel."""
    return gate_and_up.new_empty((*gate_and_up.shape[:-1], gate_and_up.shape[-1] // 2))


def swiglu_back(grad: Tensor, gate_and_up: Tensor) -> Tensor:
    """Stand in for its gradient."""
    return torch.empty_like(gate_and_up)


class NoLaunch:
    """A Triton kernel that is not launched."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **settings: None


def import_kernels_without_triton() -> None:
    """Import the kernels, which are not launched here, on a machine without their compiler."""
    with patch.dict(sys.modules, {"triton": MagicMock(), "triton.language": MagicMock()}):
        names = [f"srlm_mega.kernels.{name}" for name in ("row_kernels", "logprob", "dpo_kernel")]
        kernels = {name: import_module(name) for name in names}
    sys.modules |= kernels


@contextmanager
def cuda_road(watch: StepWatch, gpu: GpuModel) -> Iterator[None]:
    """Let the block take the trainer's branches for a GPU, with stand-ins for what only that can do. `watch` counts
    copies of values to the host and of numbers to the device, for which the host waits."""
    real_tensor, real_zeros, real_cpu = torch.tensor, torch.zeros, Tensor.cpu

    def tensor(data: Any, **settings: Any) -> Tensor:
        made: Tensor = real_tensor(data, **settings)
        if settings.get("device") is None:
            watch.put_on_host(made)
        else:
            watch.count_read(None)
        return made

    def zeros(*size: Any, **settings: Any) -> Tensor:
        made: Tensor = real_zeros(*size, **settings)
        if settings.get("device") == "cpu":  # as a word: devices of the job are torch.device here
            watch.put_on_host(made)
        return made

    def cpu(self: Tensor) -> Tensor:
        copy = real_cpu(self).clone()
        if watch.is_on_host(self):  # Megatron's cuda(), which training on a CPU has renamed
            return real_zeros(self.shape, dtype=self.dtype)
        watch.count_read(self)
        watch.put_on_host(copy)
        return copy

    if not installed("triton"):
        import_kernels_without_triton()
    from srlm_mega.kernels import dpo_kernel, row_kernels

    with ExitStack() as stack:
        for target, name, stand_in in (
            (FakeTensor, "is_cuda", property(lambda self: True)),
            (torch.cuda, "get_device_capability", lambda device=None: gpu.capability),
            (torch, "tensor", tensor),
            (torch, "zeros", zeros),
            (Tensor, "cpu", cpu),
            (F, "rms_norm", rms_norm),
            (F, "dropout", dropout),
            (F, "scaled_dot_product_attention", attention),
            (fused_bias_dropout, "bias_dropout_add_fused_train", dropout_add),
            (fused_bias_dropout, "bias_dropout_add_fused_inference", dropout_add_in_inference),
            (fused_bias_swiglu, "swiglu", swiglu),
            (fused_bias_swiglu, "swiglu_back", swiglu_back),
            (row_kernels, "row_stats_kernel", NoLaunch()),
            (row_kernels, "row_gradient_kernel", NoLaunch()),
            (dpo_kernel, "dpo_kernel", NoLaunch()),
        ):
            stack.enter_context(patch.object(target, name, stand_in))
        yield
