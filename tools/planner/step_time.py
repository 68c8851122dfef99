"""Seconds of an optimiser step as a sum of physical quantities, each times one calibrated factor.

Quantities are the job's work at data-sheet speed: FLOP / peak, bytes / bandwidth, messages / link speed, counts.
Factors (FITTED) tell how far real kernels are from the data sheet, and which share of communication is exposed. No
factor belongs to a model, a GPU count or a publication.
"""

from dataclasses import dataclass, fields, replace

from srlm_mega.tools.planner.communication import (
    context_parallel_seconds,
    gathers_every_micro_batch,
    gradient_seconds,
    pipeline_seconds,
    ring_share,
    sharded_weights_hops,
    sharded_weights_seconds,
    tensor_parallel_seconds,
    weight_seconds,
)
from srlm_mega.tools.planner.job import Job

ATTENTION_BACKWARD = 2.5  # flash attention backward: five products where forward has two
OPTIMIZER_BYTES = 30  # per parameter: gradient, master weight and two moments read, three written, weight written
SOFTMAX_BYTES = 52  # per logit: Megatron's vocab-parallel cross entropy reads and writes fp32 copies
FUSED_LOSS_BYTES = 10  # per logit: bf16 read for the sum and for its gradient, which is written in place, and scaled
FUSED_HEAD_BYTES = 14  # per logit: fp32 written and read; e written, read and written in bf16 (docs/kernels.md)
FORWARD, BACKWARD = 1 / 3, 2 / 3  # of a micro batch's work
HIDES = 0.7  # of this work: it is slower beside messages. More would let the fitted factors make more work a gain
NEVER_HIDDEN = 0.2  # of messages that overlap with work: the first, the last, and the slowdown they cause


@dataclass(frozen=True)
class Quantities:
    """Seconds at data-sheet speed (the last two: counts)."""

    matrices_bf16: float = 0.0
    matrices_fp8: float = 0.0
    matrix_bytes: float = 0.0  # operands and results of matrix products
    attention: float = 0.0  # kernels made for Hopper and later
    attention_flash2: float = 0.0
    attention_ring: float = 0.0  # blocks that came around torch's ring of context parallelism
    passes: float = 0.0  # everything bound by memory: norms, SwiGLU, rotary, residuals, casts, softmax, optimizer
    untuned: float = 0.0  # all of the above, roughly: what software loses that is not NVIDIA's of 2025
    tensor_parallel: float = 0.0
    tensor_parallel_serial: float = 0.0  # without overlap with the products
    context_parallel: float = 0.0
    pipeline: float = 0.0
    data_parallel: float = 0.0
    launches: float = 0.0  # layers that pass through a micro batch: kernels started
    hops: float = 0.0  # messages one after the other

    def plus(self, other: "Quantities", times: float = 1.0) -> "Quantities":
        """Return self + times * other."""
        return Quantities(*(a + times * b for a, b in zip(self.values, other.values, strict=True)))

    def times(self, factors: "Quantities") -> "Quantities":
        """Return each quantity times its factor."""
        return Quantities(*(a * b for a, b in zip(self.values, factors.values, strict=True)))

    @property
    def values(self) -> tuple[float, ...]:
        """The quantities in the order of `NAMES`."""
        return tuple(self.__dict__.values())


NAMES = tuple(item.name for item in fields(Quantities))


def layer_quantities(job: Job) -> Quantities:
    """Return the quantities of one layer and micro batch, forward and backward, on one rank."""
    gpu, messages = job.gpu, tensor_parallel_seconds(job, 1)
    products = matrix_flops(job) / (gpu.flops_per_second(job.precision) * gpu.sustained)
    attention = attention_flops(job) * (1 + ATTENTION_BACKWARD + job.repeats_attention)
    attention /= gpu.flops_per_second("bf16") * gpu.sustained
    around = attention * ring_share(job.layout.cp) if job.stack.ring_in_blocks else 0.0
    work = Quantities(
        matrices_bf16=0.0 if job.precision == "fp8" else products,
        matrices_fp8=products if job.precision == "fp8" else 0.0,
        matrix_bytes=matrix_bytes(job) / gpu.bytes_per_second,
        attention=0.0 if job.stack.flash2 else attention - around,
        attention_flash2=attention - around if job.stack.flash2 else 0.0,
        attention_ring=around,
        passes=(pass_bytes(job) + cast_bytes(job) + adapter_bytes(job)) / gpu.bytes_per_second,
        tensor_parallel=messages if job.stack.overlaps_tensor_parallel else 0.0,
        tensor_parallel_serial=0.0 if job.stack.overlaps_tensor_parallel else messages,
        launches=1 + job.repeated_products / 3,
    )
    return work if job.stack.tuned else replace(work, untuned=nominal_seconds(work))


def matrices(job: Job) -> list[tuple[float, float]]:
    """Return (inputs, outputs) of a layer's matrices on one tensor-parallel rank."""
    tp = job.layout.tp
    return [(k, n / tp) if outputs_split else (k / tp, n) for k, n, outputs_split in job.shape.layer_matrices]


def matrix_flops(job: Job) -> float:
    """Return the FLOP of a layer and micro batch: forward, gradients of inputs and weights, and recompute."""
    products = (2 if job.frozen else 3) + job.repeated_products
    return sum(2 * job.local_tokens * k * n * products for k, n in matrices(job))


def matrix_bytes(job: Job) -> float:
    """Return the bytes of the same products' operands and results, and of the gradients that are accumulated."""
    element, tokens = 1 if job.precision == "fp8" else 2, job.local_tokens
    total = 0.0
    for k, n in matrices(job):
        total += ((tokens * k + k * n) * element + tokens * n * 2) * (2 + job.repeated_products)
        if not job.frozen:
            total += tokens * (k + n) * element + 2 * job.gradient_bytes * k * n
    return total


def pass_bytes(job: Job) -> float:
    """Return the bytes of a layer's passes over bf16 activations, forward and backward: per token 48 per hidden column
    (norms, residuals), 16 per MLP column (SwiGLU), 8 per query and key column (rotary)."""
    shape, tp = job.shape, job.layout.tp
    hidden = 48 * shape.hidden / job.layout.row_shards
    mlp = 16 * shape.ffn / tp * (1 if shape.gated else 0.75)
    rotary = 8 * (shape.query_size + shape.kv_size) / tp
    return (hidden + mlp + rotary) * job.local_tokens * (1 + 0.4 * job.repeated_products)


def cast_bytes(job: Job) -> float:
    """Return the bytes of casts to FP8: inputs and gradients are read in bf16 and written twice, once transposed; a
    scale from the tensor itself takes one more pass."""
    if job.precision != "fp8":
        return 0.0
    columns = sum(k * (1 + job.repeated_products) + n for k, n in matrices(job))
    return job.local_tokens * columns * (4 + 2 * job.current_scaling)


def adapter_bytes(job: Job) -> float:
    """Return the bytes that LoRA's adapters read and write beside each matrix: forward its input, and a result that is
    added to the matrix's; backward the result's gradient for both factors, and the input's, which is added too."""
    if not job.frozen:
        return 0.0
    return 2 * job.local_tokens * sum(3 * k + 5 * n for k, n in matrices(job))


def attention_flops(job: Job) -> float:
    """Return the forward FLOP of one layer and micro batch on one rank: two causal products, half the sequence."""
    length = job.attended_length or job.seq_length
    return 2 * job.local_tokens * length * job.shape.query_size / job.layout.tp


def head_quantities(job: Job) -> Quantities:
    """Return the quantities of the output matrix (always bf16) and of the softmax over the vocabulary in fp32."""
    shape, gpu, tp = job.shape, job.gpu, job.layout.tp
    rows, columns = job.local_tokens * job.head_rows, shape.vocab / tp
    flops = 2 * rows * shape.hidden * columns * (2 if job.frozen else 3)
    softmax_bytes = SOFTMAX_BYTES
    if job.fused_head:
        softmax_bytes = FUSED_HEAD_BYTES
    elif job.stack.fused_loss:
        softmax_bytes = FUSED_LOSS_BYTES
    operands = 3 * (rows * shape.hidden + shape.hidden * columns + rows * columns) * 2
    return Quantities(
        matrices_bf16=flops / (gpu.flops_per_second("bf16") * gpu.sustained),
        matrix_bytes=operands / gpu.bytes_per_second,
        passes=softmax_bytes * rows * columns / gpu.bytes_per_second,
        launches=1,
    )


def layers_per_stage(job: Job) -> float:
    """Return the layers of the fullest stage; where they do not divide, embedding and head are two (405B: 126 + 2)."""
    layers, pp = job.shape.num_layers, job.layout.pp
    return layers / pp if layers % pp == 0 else (layers + 2) / pp


def stage_parameters(job: Job) -> float:
    """Return the parameters of the fullest stage on one tensor-parallel rank."""
    shape = job.shape
    layers = shape.num_layers / job.layout.pp * shape.layer_parameters
    ends = shape.vocab * shape.hidden * (2 if job.layout.pp == 1 and not shape.tied else 1)
    return (layers + ends) / job.layout.tp


@dataclass(frozen=True)
class StepParts:
    """A step = once + micro_batches * micro_batch + bubble, on a rank of the slowest pipeline stage."""

    once: Quantities  # gradients summed, optimizer
    micro_batch: Quantities
    micro_batches: float
    bubble: Quantities  # waiting for the pipeline to fill and to drain

    @property
    def total(self) -> Quantities:
        """Quantities of the whole step."""
        return self.once.plus(self.micro_batch, self.micro_batches).plus(self.bubble)


def step_quantities(job: Job) -> Quantities:
    """Return the quantities of a whole optimiser step on a rank of the slowest pipeline stage, its bubble included."""
    return step_parts(job).total


def step_parts(job: Job) -> StepParts:
    """Return the parts of an optimiser step."""
    layout, layers, parameters = job.layout, layers_per_stage(job), stage_parameters(job)
    body = Quantities().plus(layer_quantities(job), layers)
    # Where layers do not divide, the last stage has fewer of them and the head in their place.
    divides = job.shape.num_layers % layout.pp == 0
    slowest = body.plus(head_quantities(job), 1.0 if divides else 0.0)
    work = nominal_seconds(slowest)
    every = gathers_every_micro_batch(job)
    attention = nominal_seconds(Quantities(attention=body.attention, attention_flash2=body.attention_flash2))
    micro_batch = slowest.plus(
        Quantities(
            context_parallel=exposed(context_parallel_seconds(job, layers), attention),
            pipeline=pipeline_seconds(job),
            data_parallel=exposed(sharded_weights_seconds(job, parameters), BACKWARD * work) if every else 0.0,
            hops=sharded_weights_hops(job, layers) if every else 0.0,
        )
    )
    # Every stage sums gradients by buckets while its last micro batch goes back, and gathers weights while its first
    # one goes forward.
    beside_sums = HIDES * BACKWARD * work * layout.overlap_grad_reduce
    beside_gathers = HIDES * FORWARD * work * layout.overlap_param_gather
    once = Quantities(
        data_parallel=exposed(gradient_seconds(job, parameters), beside_sums)
        + exposed(weight_seconds(job, parameters), beside_gathers),
        passes=0.0 if job.frozen else parameters * optimizer_bytes(job) / job.gpu.bytes_per_second,
    )
    return StepParts(once, micro_batch, job.micro_batches, Quantities().plus(body, (layout.pp - 1) / layout.vpp))


def exposed(messages: float, work: float) -> float:
    """Return the seconds of messages that `work` seconds do not hide: the excess, at least a share that never hides."""
    return max(NEVER_HIDDEN * messages, messages - work)


def nominal_seconds(quantities: Quantities) -> float:
    """Return roughly the seconds of work, to know what it hides; before calibration."""
    return sum(quantities.times(NOMINAL).values)


def optimizer_bytes(job: Job) -> float:
    """Return the bytes per parameter and step: Adam on this rank's share, the gradient buffer cleared, FP8 copies of
    the weights."""
    shards = job.layout.optimizer_shards
    return OPTIMIZER_BYTES / shards + job.gradient_bytes + (4 if job.precision == "fp8" else 0)


NOMINAL = Quantities(
    matrices_bf16=1.4, matrices_fp8=1.6, attention=2.0, attention_flash2=2.7, attention_ring=4.0, passes=1.3
)
# A factor of 1.5 for matrix products means 65 % of the data sheet's peak; 0.5 for messages that half of them adds to
# the step. Found by tools/scripts/calibrate_planner.py, kept here so that planning needs no fit.
FITTED = Quantities(
    matrices_bf16=1.477,
    matrices_fp8=1.671,
    matrix_bytes=0.4376,
    attention=1.976,
    attention_flash2=2.778,
    attention_ring=4.431,
    passes=1.378,
    untuned=0.09673,
    tensor_parallel=0.4975,
    tensor_parallel_serial=1.18,
    context_parallel=0.8212,
    pipeline=0.4854,
    data_parallel=1.082,
    launches=9.877e-05,
    hops=5.354e-06,
)
