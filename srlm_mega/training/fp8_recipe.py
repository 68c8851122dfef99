"""FP8: Megatron's settings, and the lengths that FP8 matrix products take. This has not been run on a GPU."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, assert_never

from megatron.core.transformer.module import MegatronModule

from srlm_mega.config.training import ParallelConfig, TrainerConfig


def fp8_settings(trainer: TrainerConfig) -> dict[str, Any]:
    """Return fields of Megatron's TransformerConfig. Weights stay in bf16 and are cast in each layer."""
    return {
        "fp8": trainer.fp8,
        "fp8_recipe": trainer.fp8_recipe,
        "fp8_amax_history_len": trainer.fp8_amax_history_len,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": trainer.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": trainer.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": trainer.num_layers_at_end_in_bf16,
    }


def length_multiple(trainer: TrainerConfig, parallel: ParallelConfig) -> int:
    """Return what the number of input positions of a forward pass must be a multiple of; 1 without FP8.

    Matrix products over positions (the weights' gradients) take multiples of `fp8_block` on each tensor-parallel rank's
    part of the sequence.
    """
    if trainer.fp8 is None:
        return 1
    parts = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return trainer.fp8_block * parts * parallel.context_parallel_size


def precision_before_training(model: Sequence[MegatronModule], trainer: TrainerConfig) -> AbstractContextManager[None]:
    """Return a block for passes before all others: bf16 where FP8 is scaled by earlier passes, else no change."""
    match trainer.fp8_recipe:
        case "delayed":
            return without_fp8(model)
        case "tensorwise" | "blockwise" | "mxfp8":
            return nullcontext()
        case _:
            assert_never(trainer.fp8_recipe)


@contextmanager
def without_fp8(model: Sequence[MegatronModule]) -> Iterator[None]:
    """Let the layers compute in bf16 inside the block: Megatron reads the configuration at every forward pass."""
    modules = [module for chunk in model for module in chunk.modules() if isinstance(module, MegatronModule)]
    configs = {id(module.config): module.config for module in modules}
    formats = {key: config.fp8 for key, config in configs.items()}
    for config in configs.values():
        config.fp8 = None
    try:
        yield
    finally:
        for key, config in configs.items():
            config.fp8 = formats[key]
