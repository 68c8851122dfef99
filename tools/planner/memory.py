"""Bytes on a GPU of every pipeline stage.

Weights, gradients and optimizer state are those by which srlm_mega/training/memory_budget.py refuses layouts (a test
compares the two). What layers keep for the backward pass, its temporaries and buffers are counted as operations make
them, and compared with a rehearsal of the trainer (a test). A margin stands for what nobody counts: libraries, and
memory that an allocator cannot give out again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from srlm_mega.config.model_sizes import GIB, GRADIENT_BYTES, optimizer_bytes, weight_bytes
from srlm_mega.gpus import GpuModel
from srlm_mega.tools.planner.job import Job

Fit = Literal["fits", "tight", "does not fit"]  # tight: only without the margin

MARGIN = 0.17  # assumed, of everything else: memory that the allocator reserves and does not give out
LIBRARY_BYTES = 1.0 * GIB  # assumed: work spaces of cuBLAS and NCCL
BUCKET_PARAMETERS = 1e8  # of FSDP, which copies what it sends; Megatron sends its gradient buffer in place
FUSED_CHUNK_ROWS = 1024  # rows of fp32 logits that the fused head holds at a time
INDEX_BYTES = 32  # of a position: token, place, and a label's row and token


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU of one pipeline stage."""

    stage: int
    parameters: float  # on this rank
    weights: float
    gradients: float
    optimizer: float
    activations: float  # kept for the backward pass, of all micro batches in flight
    temporaries: float  # of the backward pass of a layer or the embedding, whichever makes more; 0 if the head does
    head: float  # of the head's backward pass; 0 if a layer's makes more
    communication: float
    cp_buffers: float
    pp_buffers: float
    libraries: float  # assumed, part of the margin
    allocator_share: float  # assumed, the other part

    @property
    def needed(self) -> float:
        """Bytes without the margin: the most that tensors take."""
        state = self.weights + self.gradients + self.optimizer
        passes = self.activations + self.temporaries + self.head
        return state + passes + self.communication + self.cp_buffers + self.pp_buffers

    @property
    def margin(self) -> float:
        """Bytes of libraries, and bytes that the allocator cannot give out again: an assumption."""
        return self.allocator_share * self.needed + self.libraries

    @property
    def total(self) -> float:
        """Bytes with the margin."""
        return self.needed + self.margin


def stage_memory(job: Job, margin: float = MARGIN) -> list[StageMemory]:
    """Return the memory of every pipeline stage; `margin` is the allocator's share."""
    return [_stage(job, stage, margin) for stage in range(job.layout.pp)]


def fullest_stage(job: Job) -> StageMemory:
    """Return the stage that decides whether a layout fits."""
    return max(stage_memory(job), key=lambda stage: stage.total)


def fit(stages: Sequence[StageMemory], gpu: GpuModel) -> Fit:
    """Tell whether every stage fits the device: with the margin, only without it, or not at all."""
    if max(stage.total for stage in stages) <= gpu.memory_bytes:
        return "fits"
    return "tight" if max(stage.needed for stage in stages) <= gpu.memory_bytes else "does not fit"


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


def _stage(job: Job, stage: int, margin: float) -> StageMemory:
    layout, parameters = job.layout, parameters_of(job, stage)
    weights, gradients, optimizer = _fsdp_state(job, stage) if layout.fsdp > 1 else _state(job, parameters)
    temporaries, head = temporary_bytes(job, stage), 0.0
    if stage == layout.pp - 1:
        head = head_bytes(job) + (weight_places(job) if job.stack.layers == "transformer_engine" else 0.0)
    return StageMemory(
        stage,
        parameters,
        weights,
        gradients,
        optimizer,
        activations=activation_bytes(job, stage),
        temporaries=temporaries if temporaries > head else 0.0,
        head=head if head >= temporaries else 0.0,
        communication=communication_bytes(job, parameters),
        cp_buffers=8 * job.local_tokens * job.shape.kv_size / layout.tp * element_bytes(job) if layout.cp > 1 else 0.0,
        pp_buffers=pipeline_bytes(job, stage),
        libraries=LIBRARY_BYTES if job.precision != "fp32" else 0.0,
        allocator_share=margin,
    )


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


def chunks_in_flight(job: Job, stage: int) -> float:
    """Return the most model chunks times micro batches whose activations a stage holds: 1F1B, or interleaved."""
    layout = job.layout
    if layout.vpp == 1:
        return min(job.micro_batches, layout.pp - stage)
    return min(job.micro_batches * layout.vpp, 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1)


def layers_in_flight(job: Job, stage: int) -> float:
    """Return the most layers times micro batches whose activations a stage holds."""
    return chunks_in_flight(job, stage) * layers_of(job, stage) / job.layout.vpp


def element_bytes(job: Job) -> int:
    """Return the bytes of an activation's element."""
    return 4 if job.precision == "fp32" else 2


def operand_bytes(job: Job) -> int:
    """Return the bytes of an element of a product's input: Transformer Engine keeps what it cast to FP8."""
    return 1 if job.precision == "fp8" and job.stack.layers == "transformer_engine" else element_bytes(job)


def hidden_bytes(job: Job) -> float:
    """Return the bytes of a micro batch's hidden states, as sequence parallelism splits them."""
    return job.local_tokens * job.shape.hidden / job.layout.row_shards * element_bytes(job)


def mask_bytes(job: Job) -> float:
    """Return the bytes that one dropout keeps: a byte per number, or on a CPU a number of the same type."""
    return hidden_bytes(job) / (1 if job.eager else element_bytes(job)) if job.hidden_dropout else 0.0


def norm_bytes(job: Job) -> float:
    """Return the bytes that one norm keeps: its input, the result (which the linear behind it needs) and an fp32 number
    per row. Torch layers norm an fp32 copy, and keep the result before it is multiplied with the norm's weight too;
    their selective recompute makes these again from the input."""
    rows, element = job.local_tokens / job.layout.row_shards, element_bytes(job)
    columns = 4 + element if job.stack.layers == "torch" and job.recompute != "selective" else element
    return rows * (job.shape.hidden * (columns + operand_bytes(job)) + 4)


def attention_bytes(job: Job) -> float:
    """Return the bytes that attention keeps: the joint queries, keys and values, of which the values are a view;
    queries and keys after rotation; the result, in FP8 also cast; a statistic per row and head. Flash attention keeps
    no scores, and draws its dropout again. Compiled layers have keys and values of their own, which rotation replaces.
    Torch layers also keep cosines and sines, of queries and of keys; on a CPU the result in parts and as one; with
    context parallelism all ranks' keys and values, and a mask."""
    shape, cp, torch_layers = job.shape, job.layout.cp, job.stack.layers == "torch"
    if job.stack.layers == "compiled":
        columns = 2 * shape.query_size + 2 * shape.kv_size
    else:
        columns = 3 * shape.query_size + 3 * shape.kv_size
    if torch_layers:
        columns += (shape.query_size if job.eager else 0) + 2 * shape.kv_size * (cp - 1)
    cast = shape.query_size if operand_bytes(job) == 1 else 0
    split = (columns * element_bytes(job) + cast + 4 * shape.heads) / job.layout.tp
    whole = 4 * shape.query_size / shape.heads * element_bytes(job) if torch_layers else 0.0
    mask = job.seq_length**2 / cp * element_bytes(job) if torch_layers and cp > 1 else 0.0
    return job.local_tokens * (split + whole) + mask


def mlp_bytes(job: Job) -> float:
    """Return the bytes that the MLP keeps: the first linear's result, SwiGLU's, and on a CPU the gate's."""
    first = (job.shape.mlp_inputs + job.shape.ffn * job.eager) * element_bytes(job)
    return job.local_tokens / job.layout.tp * (first + job.shape.ffn * operand_bytes(job))


def layer_bytes(job: Job) -> float:
    """Return the bytes that one layer keeps of one micro batch without recompute. Residual sums are not kept."""
    return 2 * (norm_bytes(job) + mask_bytes(job)) + attention_bytes(job) + mlp_bytes(job)


def kept_bytes(job: Job) -> float:
    """Return the bytes that one layer keeps of one micro batch, by recompute mode."""
    shape, tp = job.shape, job.layout.tp
    if job.recompute == "full":
        return hidden_bytes(job)
    if job.repeated_products == 0:
        return layer_bytes(job)
    results = shape.query_size + 2 * shape.kv_size + shape.mlp_inputs + 2 * shape.hidden
    columns = (shape.query_size + results * (1 - job.repeated_products)) / tp
    return hidden_bytes(job) + job.local_tokens * columns * element_bytes(job)


def activation_bytes(job: Job, stage: int) -> float:
    """Return the bytes that a stage keeps of all micro batches in flight: layers, the embedding's dropout, the last
    norm; and all of a step's token ids."""
    chunks = chunks_in_flight(job, stage)
    ends = mask_bytes(job) * (stage == 0) + norm_bytes(job) * (stage == job.layout.pp - 1)
    ids = job.micro_batches * job.local_tokens * INDEX_BYTES
    return layers_in_flight(job, stage) * kept_bytes(job) + chunks * ends + ids


def temporary_bytes(job: Job, stage: int) -> float:
    """Return the bytes of the backward pass of a layer or the embedding, whichever makes more. The embedding's comes
    when its micro batch's layers are done with, and have freed what they kept."""
    chunk = layers_of(job, stage) / job.layout.vpp
    embedding = _embedding_bytes(job) - chunk * kept_bytes(job) if stage == 0 else 0.0
    return max(layer_temporaries(job), embedding)


def layer_temporaries(job: Job) -> float:
    """Return the bytes of the backward pass of one layer: what recompute makes again, and in the MLP the gradients of
    hidden states (arriving, and gathered by sequence parallelism), of an inner result, and of a weight. When the first
    linear's turn comes, the MLP's results are freed."""
    shape, tp, element = job.shape, job.layout.tp, element_bytes(job)
    whole = job.local_tokens * shape.hidden * element
    second = 2 * hidden_bytes(job) + (whole if job.layout.row_shards > 1 else 0.0)
    second += job.local_tokens * shape.ffn / tp * element
    first = 3 * hidden_bytes(job) + whole + job.local_tokens * shape.mlp_inputs / tp * element - mlp_bytes(job)
    recomputed = layer_bytes(job) + hidden_bytes(job) if job.repeated_products else 0.0
    return recomputed + weight_places(job) + max(first, second)


def weight_places(job: Job) -> float:
    """Return the bytes of places for weights' gradients, which autograd wants although they are in Megatron's buffers:
    the largest weight's while its backward pass runs; with Transformer Engine those of a layer, which it holds."""
    weights = [inputs * outputs / job.layout.tp * element_bytes(job) for inputs, outputs, _ in job.shape.layer_matrices]
    if job.frozen:
        return 0.0
    return sum(weights) if job.stack.layers == "transformer_engine" else max(weights)


def head_bytes(job: Job) -> float:
    """Return the bytes of the head's backward pass. Whole logits: in bf16, in fp32, softmax or gradient in fp32,
    gradient in bf16; a fused loss has none in fp32. Ours: exp(z - max), which becomes the gradient in place, for the
    rows that count; their hidden states and gradients; all rows gathered; their gradients, before and after these are
    scattered, or the place for the matrix's gradient. In the forward pass, before those gradients, chunks of fp32
    logits."""
    rows, columns, element = job.local_tokens * job.head_rows, -(-job.shape.vocab // job.layout.tp), element_bytes(job)
    if not job.fused_head:
        return rows * columns * (2 * element + (0 if job.stack.fused_loss else 8))
    hidden = job.shape.hidden * element
    gathered = job.local_tokens * hidden if job.layout.row_shards > 1 else 0.0
    place = 0.0 if job.frozen else columns * hidden
    gradients = rows * hidden + 2 * hidden_bytes(job) + max(job.local_tokens * hidden, place)
    logits = min(rows, FUSED_CHUNK_ROWS) * columns * 4
    return rows * columns * element + gathered + rows * hidden + max(gradients, logits)


def _embedding_bytes(job: Job) -> float:
    """Return the bytes of the embedding's backward pass: gathered gradients of its rows, and the matrix's gradient."""
    if job.frozen:
        return 0.0
    matrix = -(-job.shape.vocab // job.layout.tp) * job.shape.hidden
    return (matrix + 2 * job.local_tokens * job.shape.hidden) * element_bytes(job)


def pipeline_bytes(job: Job, stage: int) -> float:
    """Return the bytes of what a stage got and sent of every micro batch in flight, which the schedule holds, and of
    gradients in transfer. With full recompute what it got is the first layer's input, which is counted there."""
    layout = job.layout
    if layout.pp == 1:
        return 0.0
    got = (stage > 0 or layout.vpp > 1) and job.recompute != "full"
    ends = got + (stage < layout.pp - 1 or layout.vpp > 1)
    return (chunks_in_flight(job, stage) * ends + 2) * hidden_bytes(job)


def communication_bytes(job: Job, parameters: float) -> float:
    """Return the bytes of gathered inputs (TP), in one buffer of Megatron's linears or two tensors of compiled layers
    (Transformer Engine's are among the temporaries), and of two buckets that FSDP copies."""
    buffers = {"torch": 1, "transformer_engine": 0, "compiled": 2}[job.stack.layers]
    layout = job.layout
    gathered = job.local_tokens * job.shape.hidden * element_bytes(job) if layout.row_shards > 1 else 0.0
    return buffers * gathered + (2 * GRADIENT_BYTES * min(parameters, BUCKET_PARAMETERS) if layout.fsdp > 1 else 0.0)
