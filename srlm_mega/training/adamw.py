"""AdamW and the gradients' norm by torch, for Megatron where neither Transformer Engine nor apex is installed.

This AdamW keeps its step in the parameter group, as theirs do: Megatron's distributed checkpoints read it there, and
with torch's own AdamW, which keeps one per parameter, the distributed optimizer cannot be loaded. The arithmetic is
torch's.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor
from torch.optim.adamw import adamw


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay. Its caller fills the state: `exp_avg` and `exp_avg_sq` of each parameter."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable, "weight decay is decoupled, no step is captured in a CUDA graph"
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "step": 0})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self) -> None:
        """Update every parameter that has a gradient. Groups without parameters count their steps too."""
        for group in self.param_groups:
            group["step"] += 1
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            # Counted up in place. One tensor in parts: the device fills it once, instead of a copy per parameter.
            steps = torch.full((len(params),), group["step"] - 1.0, device=params[0].device)
            adamw(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                max_exp_avg_sqs=[],
                state_steps=list(steps.unbind()),
                fused=fusible(params),
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def fusible(params: Sequence[Tensor]) -> bool:
    """Tell whether one kernel updates these parameters together: on CUDA. On a CPU it would round otherwise."""
    return bool(params[0].is_cuda)


def total_norm(
    chunk_size: int, noop_flag: Tensor | None, tensor_lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Return the L2 norm [1] of all tensors, fp32. Megatron's own function, whose arguments these are, takes the norm
    of each tensor to the host."""
    (tensors,) = tensor_lists
    return torch.nn.utils.get_total_norm(tensors).view(1), None


def use_without_fused() -> None:
    """Make Megatron use this AdamW and this norm where neither Transformer Engine nor apex is installed."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = total_norm
    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
        megatron_optimizer.Adam = distrib_optimizer.Adam = AdamW
        distrib_optimizer.HAVE_APEX_OR_TE = True
        distrib_optimizer.USING_APEX_OPTIMIZER = True  # the step is read from the parameter groups


def package() -> str:
    """Return the package that computes Megatron's optimizer steps: transformer_engine, apex or torch."""
    name: str = megatron_optimizer.Adam.__module__.partition(".")[0]
    return "torch" if megatron_optimizer.Adam is AdamW else name
