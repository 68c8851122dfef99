"""Bytes that the sampler's GPUs must hold: a replica's weights with at least one sequence, and FP8's calibration."""

from srlm_mega.config import Config
from srlm_mega.config.model_sizes import GIB
from srlm_mega.errors import UserError
from srlm_mega.gpus import GpuModel
from srlm_mega.tools.planner.generation import USABLE, Replica

CALIBRATED_TOKENS = 2048  # the most of one prompt (calibrate.py, which the planner cannot import: it needs torch)


def require_replica_fits(replica: Replica, length: int) -> None:
    """Raise UserError, with the arithmetic, where a replica cannot hold one sequence of `length` tokens."""
    if replica.batch(length) < 1:
        cache = length * replica.token_cache_bytes
        raise UserError(
            f"the sampler's model does not fit: weights {replica.weight_bytes / GIB:.1f} GiB, keys and values of one "
            f"sequence of {length} tokens {cache / GIB:.2f} GiB; a replica has {replica.gpus} x "
            f"{replica.gpu.memory_gib:.1f} GiB, of which {USABLE:.0%} can be used, and {replica.cache_fraction:.0%} of "
            "what the weights leave is for the cache. Split the model (sampler.tp_size), set sampler.quantization=fp8, "
            "or take GPUs with more memory"
        )


def require_calibration_fits(config: Config, gpu: GpuModel) -> None:
    """Raise UserError, with the arithmetic, where the GPU cannot hold what FP8's calibration has on it: one layer in 16
    bits, and what a layer computes from one prompt."""
    shape, tokens = config.model.sizes, min(CALIBRATED_TOKENS, config.model.seq_length)
    layer = 2 * (shape.layer_parameters + 2 * shape.hidden)
    # Estimated: norms in fp32, queries, keys, values repeated for each query, the MLP's results and their magnitudes.
    computed = 2 * tokens * (8 * shape.hidden + 4 * shape.query_size + 2 * shape.mlp_inputs)
    if layer + computed > USABLE * gpu.memory_bytes:
        raise UserError(
            f"FP8's calibration does not fit: one layer {layer / GIB:.1f} GiB, its results for a prompt of {tokens} "
            f"tokens {computed / GIB:.1f} GiB; a GPU has {gpu.memory_gib:.1f} GiB, of which {USABLE:.0%} can be used. "
            "Take one with more memory, or convert with an amax.json measured elsewhere (srlm convert --calibration)"
        )
