"""A rehearsal as tables and as JSON."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from srlm_mega.config import Config
from srlm_mega.config.model_sizes import GIB
from srlm_mega.gpus import GpuModel
from srlm_mega.tools.planner.memory import Fit, StageMemory
from srlm_mega.tools.planner.show import VERDICTS, table
from srlm_mega.tools.rehearsal.rehearsal_record import RankRecord

ALLOCATOR_SHARE = 0.05  # assumed: of the peak, memory that PyTorch's allocator has and cannot give out
LIBRARY_BYTES = 3 * GIB  # assumed: CUDA context, cuBLAS and NCCL
PARTS = ("weights", "gradients", "optimizer", "activations", "head", "temporaries")
MOST_LINES = 12  # of a table that may be long


@dataclass(frozen=True)
class Rehearsed:
    """Ranks that were rehearsed. `gpu` None: for CPUs. `planned`: what `srlm plan` says, by pipeline stage."""

    config: Config
    gpu: GpuModel | None
    records: Sequence[RankRecord]
    planned: Sequence[StageMemory]

    @property
    def succeeds(self) -> bool:
        """True where every rank builds, steps and fits, with what is assumed."""
        return all(record.error is None and self.fits(record) == "fits" for record in self.records)

    def needed(self, record: RankRecord) -> int:
        """Return the bytes of a device that a rank needs, with what is assumed."""
        return record.peak_bytes if self.gpu is None else int(record.peak_bytes * (1 + ALLOCATOR_SHARE)) + LIBRARY_BYTES

    def fits(self, record: RankRecord) -> Fit:
        """Tell whether a rank fits the device: with what is assumed, only without it, or not at all. Nothing is known
        of the memory of CPUs elsewhere."""
        if self.gpu is None or self.needed(record) <= self.gpu.memory_bytes:
            return "fits"
        return "tight" if record.peak_bytes <= self.gpu.memory_bytes else "does not fit"


def rehearsal_text(rehearsed: Rehearsed) -> str:
    """Return the rehearsal as tables for a terminal."""
    fine = [record for record in rehearsed.records if record.error is None]
    texts = [header(rehearsed)]
    if fine:
        fullest = max(fine, key=lambda record: record.peak_bytes)
        texts += [memory_table(rehearsed, fine), phase_table(fine), holder_table(fullest), message_table(fullest)]
        texts += [write_table(fine)] if rehearsed.gpu is None else [read_table(fullest), write_table(fine)]
    return "\n\n".join(texts)


def header(rehearsed: Rehearsed) -> str:
    """Return a line for every rank: whether it comes through and, on a GPU, whether it fits, with the arithmetic."""
    config = rehearsed.config
    product = config.parallel.product(config.data_parallel_size)
    lines = [f"{product} ranks, {config.trainer.precision}, recompute {config.trainer.recompute_granularity or 'none'}"]
    lines += sorted({record.backend for record in rehearsed.records if record.error is None})
    for record in rehearsed.records:
        lines.append(f"rank {record.rank} (stage {record.place.pp}): {verdict(rehearsed, record)}")
    return "\n".join(lines)


def verdict(rehearsed: Rehearsed, record: RankRecord) -> str:
    """Return what became of a rank."""
    if record.error is not None:
        return f"FAILS: {record.error}"
    peak, gpu = f"{gib(record.peak_bytes)} GiB of tensors", rehearsed.gpu
    if gpu is None:
        return f"{peak}; not compared with a memory, since it trains on CPUs"
    allocator = record.peak_bytes * ALLOCATOR_SHARE / GIB
    return (
        f"{VERDICTS[rehearsed.fits(record)]}: {peak} + {allocator:.2f} of the allocator "
        f"({ALLOCATOR_SHARE:.0%}, assumed) + {LIBRARY_BYTES / GIB:.0f} of CUDA, cuBLAS and NCCL (assumed) = "
        f"{rehearsed.needed(record) / GIB:.2f} of the {gpu.memory_gib:.1f} GiB of {gpu.name}"
    )


def memory_table(rehearsed: Rehearsed, records: Sequence[RankRecord]) -> str:
    """Return each rank's bytes at its peak, by kind, with what `srlm plan` says below."""
    rows = [["rank", "", "parameters", *PARTS, "peak"]]
    for record in records:
        held = [record.held(part) for part in PARTS]  # type: ignore[arg-type]
        rows.append([str(record.rank), "rehearsed", f"{record.parameters:,}", *map(gib, held), gib(record.peak_bytes)])
        plan = rehearsed.planned[record.place.pp]
        buffers = plan.temporaries + plan.communication + plan.cp_buffers + plan.pp_buffers
        parts = (plan.weights, plan.gradients, plan.optimizer, plan.activations, plan.head, buffers)
        rows.append(["", "planned", f"{plan.parameters:,.0f}", *map(gib, parts), gib(plan.needed)])
    return "Memory of a rank at its peak, GiB; planned without its margin, with buffers among temporaries\n" + table(
        rows
    )


def phase_table(records: Sequence[RankRecord]) -> str:
    """Return the peak of every phase."""
    names = [phase.name for phase in records[0].phases]
    rows = [["rank", *names, "seconds here"]]
    for record in records:
        rows.append([str(record.rank), *(gib(phase.peak_bytes) for phase in record.phases), f"{record.seconds:.0f}"])
    return "Peak of each phase, GiB\n" + table(rows)


def holder_table(record: RankRecord) -> str:
    """Return the lines that hold most."""
    rows = [["GiB", "kind", "made by"]]
    rows += [[gib(held.bytes), held.kind, held.where] for held in record.holders[:MOST_LINES]]
    return f"What holds the memory of rank {record.rank} at its peak\n" + table(rows)


def message_table(record: RankRecord) -> str:
    """Return a DPO step's messages."""
    rows = [["over", "operation", "count", "GiB"]]
    rows += [
        [each.axis, each.operation, f"{each.count:,}", f"{each.bytes / GIB:.3f}"]
        for each in record.messages
        if each.phase == "DPO step"
    ]
    if len(rows) == 1:
        return "No messages between ranks."
    return f"Messages of a DPO step of rank {record.rank} ({record.micro_batches} micro batches)\n" + table(rows)


def read_table(record: RankRecord) -> str:
    """Return the lines at which the host waits for the device in a DPO step."""
    reads: dict[str, int] = defaultdict(int)
    for read in record.host_reads:
        if read.phase == "DPO step":
            reads[read.where] += read.count
    rows = [["times", "at"], *([f"{count:,}", where] for where, count in list(reads.items())[:MOST_LINES])]
    return f"The host waits for the device in a DPO step of rank {record.rank}\n" + table(rows)


def write_table(records: Sequence[RankRecord]) -> str:
    """Return what each rank writes, and needs of its node's memory for it."""
    rows = [["rank", "checkpoint", "host memory for it", "of the Hugging Face folder"]]
    for record in records:
        sizes = record.checkpoint_bytes, record.host_bytes, record.export_bytes
        rows.append([str(record.rank), *map(gib, sizes)])
    return "Written, GiB\n" + table(rows)


def gib(size: float) -> str:
    """Return bytes in GiB, small ones with more digits."""
    return f"{size / GIB:.2f}" if size >= GIB / 10 or size == 0 else f"{size / GIB:.4f}"


def rehearsal_json(rehearsed: Rehearsed) -> dict[str, Any]:
    """Return the rehearsal for programs; bytes and seconds as numbers."""
    config, gpu = rehearsed.config, rehearsed.gpu
    return {
        "succeeds": rehearsed.succeeds,
        "gpu": None if gpu is None else gpu.name,
        "assumed": {"allocator_share": ALLOCATOR_SHARE, "library_bytes": LIBRARY_BYTES},
        "world_size": config.world_size,
        "ranks": [
            asdict(record) | {"needed_bytes": rehearsed.needed(record), "fits": rehearsed.fits(record)}
            for record in rehearsed.records
        ],
        "planned": [asdict(stage) | {"needed": stage.needed} for stage in rehearsed.planned],
    }
