"""Bytes on a GPU of every pipeline stage.

Weights, gradients and optimizer state are those by which srlm_mega/training/memory_budget.py refuses layouts (a test
compares the two). The rest is estimated: activations that the backward pass keeps of each layer in flight, the head,
buffers, and a margin for memory that an allocator cannot give out again.
"""

from dataclasses import dataclass

from srlm_mega.config.model_sizes import GIB, GRADIENT_BYTES, optimizer_bytes, weight_bytes
from srlm_mega.tools.planner.job import Job

MARGIN = 0.17  # of everything else: memory that the allocator reserves and does not give out, and parts not modelled
FIXED_BYTES = 1.0 * GIB  # cuBLAS and NCCL work spaces
BUCKET_PARAMETERS = 1e8
FUSED_CHUNK_ROWS = 1024  # rows of fp32 logits that the fused head holds at a time


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU of one pipeline stage."""

    stage: int
    parameters: float  # on this rank
    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    communication: float
    cp_buffers: float
    pp_buffers: float

    @property
    def needed(self) -> float:
        """Bytes without the margin."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.activations + self.head + self.communication + self.cp_buffers + self.pp_buffers

    @property
    def margin(self) -> float:
        """Bytes that the allocator cannot give out again, and of parts that are not modelled."""
        return MARGIN * self.needed

    @property
    def total(self) -> float:
        """Bytes with the margin."""
        return self.needed + self.margin


def stage_memory(job: Job) -> list[StageMemory]:
    """Return the memory of every pipeline stage."""
    return [_stage(job, stage) for stage in range(job.layout.pp)]


def fullest_stage(job: Job) -> StageMemory:
    """Return the stage that decides whether a layout fits."""
    return max(stage_memory(job), key=lambda stage: stage.total)


def fits(job: Job) -> bool:
    """Tell whether every stage, margin included, fits the device."""
    return fullest_stage(job).total <= job.gpu.memory_bytes


def layers_of(job: Job, stage: int) -> float:
    """Return the layers of a stage. Where they do not divide, embedding and head count as one each (405B: 126 + 2)."""
    layers, pp = job.shape.num_layers, job.layout.pp
    if layers % pp == 0:
        return layers / pp
    return (layers + 2) / pp - (stage == 0) - (stage == pp - 1)


def parameters_of(job: Job, stage: int) -> float:
    """Return the parameters of a pipeline stage on one tensor-parallel rank."""
    first, last = stage == 0, stage == job.layout.pp - 1
    return job.shape.parameters_on_rank(layers_of(job, stage), job.layout.tp, first, last)


def _stage(job: Job, stage: int) -> StageMemory:
    layout, parameters = job.layout, parameters_of(job, stage)
    weights, gradients, optimizer = _fsdp_state(job, stage) if layout.fsdp > 1 else _state(job, parameters)
    activations = layers_in_flight(job, stage) * kept_bytes(job) + working_bytes(job)
    head = head_bytes(job) if stage == layout.pp - 1 else 0.0
    element, tokens, shape = element_bytes(job), job.local_tokens, job.shape
    # Two blocks of keys and values, and of their gradients, around the ring of context parallelism.
    cp_buffers = 8 * tokens * shape.kv_size / layout.tp * element if layout.cp > 1 else 0.0
    # Outputs and gradients in transfer, in and out, of every model chunk.
    pp_buffers = 4 * layout.vpp * tokens * shape.hidden / layout.row_shards * element if layout.pp > 1 else 0.0
    buffers = communication_bytes(job, parameters), cp_buffers, pp_buffers
    return StageMemory(stage, parameters, weights, gradients, optimizer, activations, head, *buffers)


def _state(job: Job, parameters: float) -> tuple[float, float, float]:
    """Return the bytes of weights, gradients and optimizer of a Megatron rank."""
    bf16 = job.precision != "fp32"
    copies = 2 if job.precision == "fp8" else 0  # each weight cast, and transposed
    weights = parameters * ((0 if job.fp8_weights and bf16 else weight_bytes(bf16)) + copies)
    if job.frozen:
        return weights, 0.0, 0.0
    return weights, parameters * job.gradient_bytes, parameters * optimizer_bytes(bf16) / job.layout.optimizer_shards


def _fsdp_state(job: Job, stage: int) -> tuple[float, float, float]:
    """Return the bytes of weights, gradients and optimizer with FSDP: all in fp32 shards, and what is gathered of them:
    two layers and the vocabulary or, with a pipeline, the whole stage, whose gradients are then whole too."""
    parameters, shards = parameters_of(job, stage), job.layout.fsdp
    moments = parameters * optimizer_bytes(bf16=False) / shards
    if job.layout.pp > 1:
        return parameters * (4 / shards + 2), parameters * 4 * (1 + 1 / shards), moments
    layer = job.shape.layer_parameters / job.layout.tp
    vocabulary = job.shape.vocab * job.shape.hidden / job.layout.tp
    sharded = parameters * 4 / shards
    return sharded + 2 * (2 * layer + vocabulary), sharded + 4 * max(layer, vocabulary), moments


def layers_in_flight(job: Job, stage: int) -> float:
    """Return the most layers times micro batches whose activations a stage holds: 1F1B, or interleaved."""
    layout, chunk = job.layout, layers_of(job, stage) / job.layout.vpp
    if layout.vpp == 1:
        return min(job.micro_batches, layout.pp - stage) * chunk
    warm_up = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(job.micro_batches * layout.vpp, warm_up) * chunk


def element_bytes(job: Job) -> int:
    """Return the bytes of an activation's element."""
    return 4 if job.precision == "fp32" else 2


def layer_bytes(job: Job) -> float:
    """Return the bytes that one layer keeps for its backward pass without recompute: the inputs of both norms and of
    the four products, queries, keys, values, the attention's statistics, and the MLP's first result; unfused also the
    normalised inputs and SwiGLU's gate. Flash attention keeps no scores."""
    shape, tp, rows = job.shape, job.layout.tp, job.layout.row_shards
    columns = 4 * shape.hidden / rows + (2 * shape.query_size + 2 * shape.kv_size + shape.mlp_inputs + shape.ffn) / tp
    if not job.fused_layers:
        columns += 2 * shape.hidden / rows + shape.ffn / tp
    return job.local_tokens * (columns * element_bytes(job) + 4 * shape.heads / tp)


def kept_bytes(job: Job) -> float:
    """Return the bytes that one layer keeps of one micro batch, by recompute mode."""
    shape, tp, rows = job.shape, job.layout.tp, job.layout.row_shards
    if job.recompute == "full":
        return job.local_tokens * shape.hidden / rows * element_bytes(job)
    if job.repeated_products == 0:
        return layer_bytes(job)
    results = shape.query_size + 2 * shape.kv_size + shape.mlp_inputs + 2 * shape.hidden
    columns = shape.hidden / rows + (shape.query_size + results * (1 - job.repeated_products)) / tp
    return job.local_tokens * columns * element_bytes(job)


def working_bytes(job: Job) -> float:
    """Return the bytes of the layer whose backward pass runs: recomputed results, and gradients of its widest ones."""
    shape, tp = job.shape, job.layout.tp
    recomputed = layer_bytes(job) if job.repeated_products else 0.0
    widest = (shape.mlp_inputs + shape.ffn) / tp + 2 * shape.hidden
    return recomputed + job.local_tokens * widest * element_bytes(job)


def head_bytes(job: Job) -> float:
    """Return the bytes of logits and their gradients. Whole: in bf16, in fp32, softmax or gradient in fp32, gradient in
    bf16. Ours: a bf16 buffer for the rows that count, and chunks of fp32 logits."""
    rows, columns = job.local_tokens * job.head_rows, -(-job.shape.vocab // job.layout.tp)
    if job.fused_head:
        return rows * columns * element_bytes(job) + min(rows, FUSED_CHUNK_ROWS) * columns * 4
    return rows * columns * (2 * element_bytes(job) + 8)


def communication_bytes(job: Job, parameters: float) -> float:
    """Return the bytes of gathered inputs (TP), two buckets of gradients (DP), and work spaces."""
    layout = job.layout
    gathered = 2 * job.local_tokens * job.shape.hidden * element_bytes(job) if layout.tp > 1 else 0.0
    buckets = 2 * GRADIENT_BYTES * min(parameters, BUCKET_PARAMETERS) if layout.dp * layout.cp > 1 else 0.0
    return gathered + buckets + (FIXED_BYTES if job.precision != "fp32" else 0.0)
