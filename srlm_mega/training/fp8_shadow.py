"""The shadow check of FP8: one micro batch's DPO margins in FP8 compared with bf16, by the same weights.

What FP8 loses shows here long before the loss does. This has not been run on FP8 hardware.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from srlm_mega.config.training import DpoConfig, OptimizationConfig, TrainerConfig
from srlm_mega.errors import CannotContinue
from srlm_mega.kernels.reference import segment_sums
from srlm_mega.training.batch import Batch
from srlm_mega.training.fp8_recipe import without_fp8
from srlm_mega.training.schedule import forward
from srlm_mega.training.topology import Topology


@dataclass(frozen=True)
class Shadow:
    """When a training stage compares its margins with bf16, and the difference that it tolerates."""

    interval: int  # optimizer steps
    threshold: float
    beta: float

    @classmethod
    def of(cls, trainer: TrainerConfig, section: OptimizationConfig) -> "Shadow | None":
        """Return the check that is configured; None where there is none, and for SFT, which has no pairs."""
        if trainer.fp8_shadow_interval is None or not isinstance(section, DpoConfig):
            return None
        return cls(trainer.fp8_shadow_interval, trainer.fp8_shadow_threshold, section.beta)

    def check(
        self, number: int, model: list[MegatronModule], batches: Sequence[Batch], topology: Topology
    ) -> dict[str, float]:
        """Return the metric of step `number`, nothing between checks. `batches` are the step's micro batches."""
        if number % self.interval:
            return {}
        interleaved = topology.parallel.virtual_pipeline_model_parallel_size is not None
        some = batches[: topology.pp_size if interleaved else 1]
        return {"fp8/margin_deviation": check_shadow(model, some, self.beta, self.threshold, topology)}


def check_shadow(
    model: list[MegatronModule], batches: Sequence[Batch], beta: float, threshold: float, topology: Topology
) -> float:
    """Return the largest difference of a reward margin between FP8 and bf16 over all ranks. CannotContinue when it is
    above `threshold` or NaN.

    `batches` are this rank's pairs of one step, as many micro batches as the pipeline's schedule needs.
    """
    own = deviation(model, lambda: reward_margins(model, batches, beta))
    largest = topology.max_over_world(own)
    if not largest <= threshold:  # true for a NaN too
        raise CannotContinue(
            f"reward margins in FP8 are up to {largest:.4g} from those in bf16, more than fp8_shadow_threshold "
            f"{threshold:g}: train with fp8_recipe=tensorwise or blockwise, with first_last_layers_bf16, or without fp8"
        )
    return largest


def deviation(model: Sequence[MegatronModule], margins: Callable[[], Tensor]) -> float:
    """Return the largest absolute difference of `margins()` with FP8 and without, dropout off; 0 for no margins."""
    training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    with torch.no_grad():  # delayed scales, too, move with gradients only
        in_fp8 = margins()
        with without_fp8(model):
            in_bf16 = margins()
    for chunk, mode in zip(model, training, strict=True):
        chunk.train(mode)
    difference = (in_fp8 - in_bf16).abs()
    return difference.max().item() if difference.numel() else 0.0


def reward_margins(model: list[MegatronModule], batches: Sequence[Batch], beta: float) -> Tensor:
    """Return beta * (log p chosen - log p rejected) of each pair [P], fp64, on the last pipeline stage; elsewhere none.

    The reference's part of a margin is the same in both precisions.
    """
    sums = [
        segment_sums(logps.double(), batch.cu_seqlens).cpu()
        for logps, batch in zip(forward(model, batches), batches, strict=False)
    ]
    pairs = torch.cat([torch.zeros(0, dtype=torch.float64), *sums]).view(-1, 2)
    return beta * (pairs[:, 0] - pairs[:, 1])
