"""Seconds of a step's messages at nominal bandwidth; how much of them adds to the step is calibrated (step_time.py).

Ranks are numbered TP, CP, DP, PP from the inside out, as Megatron does.
"""

from srlm_mega.tools.planner.job import Job

ACTIVATION_BYTES = 2  # bf16
WEIGHT_BYTES = 2
RING = 2  # FSDP's all-gathers per micro batch: forward and backward


def ring_share(size: int) -> float:
    """Return the share of a gathered buffer that one rank receives in a ring."""
    return (size - 1) / size


def tensor_parallel_seconds(job: Job, layers: float) -> float:
    """Return the TP seconds of one micro batch: per layer two all-gathers and two reduce-scatters forward; the same
    backward, and two all-gathers again of what was kept in parts (sequence parallelism). All-reduces move as much."""
    tp = job.layout.tp
    if tp == 1:
        return 0.0
    gathers = (6 if job.layout.sequence_parallel else 4) + 2 * job.repeated_products
    scatters = 4 + 2 * job.repeated_products
    gathered_bytes = 1 if job.precision == "fp8" else ACTIVATION_BYTES  # cast before they are sent
    size = job.local_tokens * job.shape.hidden * (gathers * gathered_bytes + scatters * ACTIVATION_BYTES)
    return layers * size * ring_share(tp) / job.gpu.group_bandwidth(tp, 1)


def context_parallel_seconds(job: Job, layers: float) -> float:
    """Return the CP seconds of one micro batch: keys and values around the ring, backward with their gradients."""
    cp, tp = job.layout.cp, job.layout.tp
    if cp == 1:
        return 0.0
    block = job.local_tokens * 2 * job.shape.kv_size / tp * ACTIVATION_BYTES
    return layers * 3 * (cp - 1) * block / job.gpu.neighbour_bandwidth(cp, tp)


def pipeline_seconds(job: Job) -> float:
    """Return the PP seconds of one micro batch: each model chunk passes on its output, and its input's gradient."""
    layout = job.layout
    if layout.pp == 1:
        return 0.0
    size = job.local_tokens * job.shape.hidden / layout.row_shards * ACTIVATION_BYTES
    stride = layout.tp * layout.cp * layout.dp
    return 2 * layout.vpp * size / job.gpu.neighbour_bandwidth(layout.pp, stride)


def data_parallel_seconds(job: Job, parameters: float) -> float:
    """Return the DP seconds of a step, for a stage of so many parameters on this rank: gradients summed, new weights
    gathered."""
    return gradient_seconds(job, parameters) + weight_seconds(job, parameters)


def gradient_seconds(job: Job, parameters: float) -> float:
    """Return the seconds in which a step's gradients are summed. FSDP: over the replicas of each shard, and with a
    pipeline its weights are gathered and gradients scattered once."""
    layout = job.layout
    if job.frozen:
        return 0.0
    if layout.fsdp > 1:
        replicas = max(1, layout.dp * layout.cp // layout.fsdp)
        stride = layout.tp * layout.fsdp
        size = 2 * parameters / layout.fsdp * job.gradient_bytes * ring_share(replicas)
        between = size / job.gpu.group_bandwidth(replicas, stride)
        return between + (0.0 if gathers_every_micro_batch(job) else sharded_weights_seconds(job, parameters))
    times = 1 if layout.distributed_optimizer else 2  # scattered, or also gathered again
    return _over_replicas(job, times * parameters * job.gradient_bytes)


def weight_seconds(job: Job, parameters: float) -> float:
    """Return the seconds in which the distributed optimizer's new weights are gathered."""
    if job.frozen or job.layout.fsdp > 1 or not job.layout.distributed_optimizer:
        return 0.0
    return _over_replicas(job, parameters * WEIGHT_BYTES)


def _over_replicas(job: Job, size: float) -> float:
    ranks = job.layout.dp * job.layout.cp
    return size * ring_share(ranks) / job.gpu.group_bandwidth(ranks, job.layout.tp)


def gathers_every_micro_batch(job: Job) -> bool:
    """Tell whether FSDP gathers weights for every micro batch; with a pipeline it keeps them for the whole step."""
    return job.layout.fsdp > 1 and job.layout.pp == 1


def sharded_weights_seconds(job: Job, parameters: float) -> float:
    """Return the FSDP seconds of one pass: weights gathered forward and backward, gradients scattered."""
    fsdp = job.layout.fsdp
    if fsdp == 1:
        return 0.0
    size = parameters * (RING * WEIGHT_BYTES + WEIGHT_BYTES) * ring_share(fsdp)
    return size / job.gpu.group_bandwidth(fsdp, job.layout.tp)


def sharded_weights_hops(job: Job, layers: float) -> float:
    """Return the number of consecutive FSDP messages of one micro batch: (ranks - 1) per ring and layer."""
    return layers * (RING + 1) * (job.layout.fsdp - 1)
