"""Llama as a Megatron model, split over tensor ranks, pipeline stages and virtual stages."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from srlm_mega.checkpoints_conversion.llama import LlamaShape, RopeScaling
from srlm_mega.checkpoints_conversion.placement import Placement, padded_vocab_size, placements
from srlm_mega.config import Config
from srlm_mega.config.training import OptimizationConfig
from srlm_mega.errors import UserError
from srlm_mega.training.backend import Backend, block, choose_backend, fuse_gradients
from srlm_mega.training.fp8_recipe import fp8_settings
from srlm_mega.training.llama_model import LlamaModel
from srlm_mega.training.memory_budget import MemoryBudget, num_parameters
from srlm_mega.training.topology import Topology

LLAMA3_ROPE = RopeScaling(8.0, 1.0, 4.0, 8192)


def all_placements(shape: LlamaShape, topology: Topology) -> list[Placement]:
    """Return what the ranks of one replica hold, by virtual stage, pipeline stage and tensor rank. UserError, with the
    arithmetic, when the model cannot be split this way."""
    vpp_size = topology.parallel.virtual_pipeline_model_parallel_size or 1
    try:
        return placements(shape, topology.tp_size, topology.pp_size, vpp_size)
    except ValueError as error:
        raise UserError(f"{error}: choose another parallel layout for this model") from None


def own_placements(shape: LlamaShape, topology: Topology) -> list[Placement]:
    """Return what this rank's model chunks hold, by virtual stage. Raises as `all_placements` does."""
    first, step = topology.pp_rank * topology.tp_size + topology.tp_rank, topology.pp_size * topology.tp_size
    return all_placements(shape, topology)[first::step]


def check_memory(shape: LlamaShape, config: Config, topology: Topology) -> None:
    """Raise UserError, with the arithmetic, when the largest pipeline stage's training state does not fit a process."""
    memory_budget(shape, config, topology).check(topology.memory_bytes, str(topology.device))


def memory_budget(shape: LlamaShape, config: Config, topology: Topology) -> MemoryBudget:
    """Return the training state of the largest pipeline stage. UserError when the model cannot be split this way."""
    sizes = [num_parameters(shape, part) for part in all_placements(shape, topology) if part.tp_rank == 0]
    largest = max(sum(sizes[stage :: topology.pp_size]) for stage in range(topology.pp_size))
    sharded = topology.parallel.use_distributed_optimizer
    return MemoryBudget(largest, config.trainer.bf16, topology.dp_size * topology.cp_size if sharded else 1)


@dataclass
class LlamaConfig(TransformerConfig):  # type: ignore[misc]
    """Megatron's configuration of a model, and the implementation of its layers."""

    backend: Backend = field(kw_only=True)


def build_model(config: LlamaConfig, shape: LlamaShape, topology: Topology) -> list[MegatronModule]:
    """Build this rank's model chunks (one, or one per virtual stage), with weights still to be loaded."""
    own = own_placements(shape, topology)
    if topology.is_main:
        print(config.backend, flush=True)
    return [_build_chunk(config, shape, topology, chunk, own) for chunk in range(len(own))]


def _build_chunk(
    config: LlamaConfig, shape: LlamaShape, topology: Topology, chunk: int, own: list[Placement]
) -> MegatronModule:
    check_rope_scaling(shape)
    model = LlamaModel(
        config,
        block(config.backend, len(own[chunk].layers)),
        vocab_size=padded_vocab_size(shape.vocab_size, topology.tp_size),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=own[chunk].first_stage,
        post_process=own[chunk].last_stage,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        rope_scaling=shape.rope_scaling is not None,
        rope_scaling_factor=shape.rope_scaling.factor if shape.rope_scaling else 1.0,
        vp_stage=chunk if len(own) > 1 else None,
        real_vocab_size=shape.vocab_size,
    ).to(topology.device)
    layers = tuple(layer.layer_number - 1 for layer in model.decoder.layers)
    assert layers == own[chunk].layers, f"Megatron put layers {layers} where {own[chunk].layers} belong"
    return Float16Module(config, model) if config.bf16 else model


def check_rope_scaling(shape: LlamaShape) -> None:
    """Raise UserError for a RoPE scaling that Megatron does not compute: it has Llama 3's constants, but any factor."""
    if shape.rope_scaling is None:
        return
    given = replace(shape.rope_scaling, factor=LLAMA3_ROPE.factor)
    if given != LLAMA3_ROPE:
        raise UserError(f"the trainer computes only {LLAMA3_ROPE} with any factor, the model has {shape.rope_scaling}")


def transformer_config(
    shape: LlamaShape,
    section: OptimizationConfig,
    config: Config,
    topology: Topology,
    backend: Backend | None = None,
) -> LlamaConfig:
    """Return Megatron's configuration of Llama's architecture; `backend` None: as chosen for this device.

    `hidden_dropout` acts on the embeddings and on what each attention and MLP adds to the residual stream,
    `attention_dropout` on the attention probabilities. Llama 2 itself was published without them.
    """
    parallel, trainer = topology.parallel, config.trainer
    dtype = torch.bfloat16 if trainer.bf16 else torch.float32
    backend = backend or choose_backend(config, topology.device)
    return LlamaConfig(
        backend=backend,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        attention_dropout=section.attention_dropout,
        hidden_dropout=section.hidden_dropout,
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=topology.cp_size,
        sequence_parallel=parallel.sequence_parallel,
        bf16=trainer.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        recompute_granularity=trainer.recompute_granularity,
        recompute_method="uniform" if trainer.recompute_granularity == "full" else None,
        recompute_num_layers=1 if trainer.recompute_granularity == "full" else None,
        # Megatron's default for "selective" is the attention, of which flash attention keeps nothing to recompute, and
        # its own recompute of norms needs Transformer Engine: RMSNorm does it.
        recompute_modules=[],
        calculate_per_token_loss=True,  # gradients are divided by counts of the whole global batch
        # With two stages both neighbours are the same rank, and batched sends of the interleaved schedule mix them up.
        batch_p2p_comm=False,
        overlap_p2p_comm=parallel.virtual_pipeline_model_parallel_size is not None,
        **backend.settings(),
        **fp8_settings(trainer),
        cuda_graph_scope=[],
    )


def wrap_data_parallel(
    chunks: Sequence[MegatronModule], config: LlamaConfig, topology: Topology
) -> list[MegatronModule]:
    """Wrap the chunks with gradient buffers that are summed over data-parallel ranks in fp32; with an overlap, in
    buckets of 40 million parameters, or of a million per replica if that is more."""
    parallel = topology.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    config.finalize_model_grads_func = finalize_model_grads
    # Megatron makes buckets on the first pipeline stage only, and elsewhere starts its messages when all gradients are
    # there: so the wrapper, which asks its pipeline group for nothing but that, gets a group of this rank alone.
    groups = ProcessGroupCollection.use_mpu_process_groups(["dp", "dp_cp", "expt_dp", "tp", "pp", "ep"])
    stage, groups.pp = groups.pp, groups.ep
    wrapped = [DistributedDataParallel(config, ddp_config, chunk, pg_collection=groups) for chunk in chunks]
    for chunk in wrapped:
        chunk.pp_group = stage
        fuse_gradients(config.backend, chunk)
    # Without it gradients would be reduced after as many micro batches as the first step had.
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def gather_weights(model: Sequence[MegatronModule]) -> None:
    """Complete every rank's weights before they are read outside a forward pass: with overlap_param_gather a rank
    updates its part of them, and gets the others' only when a forward pass needs them."""
    for chunk in model:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
