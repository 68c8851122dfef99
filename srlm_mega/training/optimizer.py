"""Megatron's AdamW with clipping, and a learning rate with exact end points."""

import math
from collections.abc import Sequence

import torch
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from srlm_mega.config.training import OptimizationConfig, TrainerConfig
from srlm_mega.training import adamw
from srlm_mega.training.topology import Topology


def build_optimizer(
    model: Sequence[MegatronModule], section: OptimizationConfig, trainer: TrainerConfig, topology: Topology
) -> ChainedOptimizer:
    """Return AdamW over the model's chunks; norms are not decayed. Call it after the weights are loaded."""
    adamw.use_without_fused()
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        clip_grad=section.clip_grad,
        bf16=trainer.bf16,
        params_dtype=torch.bfloat16 if trainer.bf16 else torch.float32,
        use_distributed_optimizer=topology.parallel.use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, list(model), use_gloo_process_groups=False)
    assert isinstance(optimizer, ChainedOptimizer), f"Megatron built a {type(optimizer).__name__}"
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)  # now: a checkpoint before the first update needs the state
    return optimizer


def update(optimizer: ChainedOptimizer) -> float:
    """Update the weights with the gradients in the model's buffers, clipped; return their norm, the same on all ranks.

    A norm of NaN or inf changes nothing: neither weights nor the optimizer's state.
    """
    assert not optimizer.prepare_grads(), "without a loss scale nothing overflows here"
    # All that the host reads in an update; a tensor with megatron-core 0.19 and Transformer Engine.
    norm = float(optimizer.get_grad_norm())
    if math.isfinite(norm):
        for part in optimizer.chained_optimizers:
            coefficient = part.config.clip_grad / (norm + 1e-6)
            grads = [param.grad for param in part.get_parameters() if param.grad is not None]
            if grads and coefficient < 1:
                torch._foreach_mul_(grads, coefficient)
        optimizer.step_with_ready_grads()
    return norm


def build_scheduler(
    optimizer: ChainedOptimizer, section: OptimizationConfig, num_steps: int
) -> OptimizerParamScheduler:
    """Return the schedule of the learning rate: `lr` at the first step after warm-up, `min_lr` at step `num_steps`.

    At step k = 1..W of warm-up it is lr * k / (W + 1), so that no step has a rate of zero.
    """
    last = max(1, num_steps - 1)  # Megatron counts steps from 0
    warmup = min(round(section.lr_warmup_fraction * num_steps), last - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=section.lr / (warmup + 1),
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=last,
        lr_decay_style=section.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
    )
