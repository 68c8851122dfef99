"""`srlm bench device`: how often the host waits for the GPU in a packed DPO step, by line of code.

On a GPU these are torch's own warnings (`torch.cuda.set_sync_debug_mode`); those of a backward pass come at its end, so
they count for the line that started it. On a CPU, where nothing waits, reads are counted wherever their tensors are.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.tools.bench_kernels import find_device
from srlm_mega.tools.bench_record import BenchRow, make_record, make_row, table, write_record
from srlm_mega.tools.bench_training import Bench, TrainingRequest
from srlm_mega.tools.rehearsal.watch import name_of, reads_values, short
from srlm_mega.training.device import device_name
from srlm_mega.training.optimizer import update
from srlm_mega.training.schedule import forward_backward
from srlm_mega.training.topology import Topology, process_group

WARMUP = 2
COUNTING = ("/warnings.py", "/torch/_compile.py", "/_python_dispatch.py", "/_dynamo/eval_frame.py")
WIDE = ["model.hidden_size=512", "model.ffn_hidden_size=1024"]  # heads of 128, as a large model has


def main(json: Annotated[Path, typer.Option(help="The record to write.")]) -> None:
    """Count host synchronisations of a small packed DPO step in its parts."""
    device = find_device()
    config = small_config(device)
    counts = {part: Counter[str]() for part in ("data", "forward and backward", "update")}
    with process_group(config.trainer), Topology.start(config.parallel, config.trainer, 0) as topology:
        bench = Bench(config, TrainingRequest("dpo", WARMUP, 0, False, None, None), topology)
        for number in range(WARMUP):
            bench.trainer.step(bench.objective, bench.objective.prepare(bench.indices(number)), number + 2)
        with counted(counts["data"], device):
            step = bench.objective.prepare(bench.indices(WARMUP))
        for chunk in bench.trainer.model:
            chunk.zero_grad_buffer()
        with counted(counts["forward and backward"], device):
            forward_backward(bench.trainer.model, step, bench.objective.num_sums, topology)
        with counted(counts["update"], device):
            update(bench.trainer.optimizer)
    settings = config.model_dump(mode="json", include={"model", "dpo", "parallel", "trainer"})
    settings |= {"micro_batches": len(step.micro_batches), "counted": "warnings" if device.type == "cuda" else "reads"}
    rows = [row for part, lines in counts.items() for row in rows_of(part, lines)]
    record = make_record("host syncs", settings, rows, ("flash-attn",), device_name(device))
    write_record(record, json)
    print(table(record))


def small_config(device: torch.device) -> Config:
    """Return the demo's model in one process, in bf16 and packed, on a GPU with heads of a large model's size."""
    on_gpu = [*WIDE, "trainer.device=cuda"] if device.type == "cuda" else []
    return load_config(Path("toy_cpu"), [
        "parallel.pipeline_model_parallel_size=1", "launch.processes_per_node=1", "trainer.bf16=true",
        "model.layer_backend=torch", "dpo.global_batch_size=8", *on_gpu,
    ])  # fmt: skip


def rows_of(part: str, lines: Counter[str]) -> list[BenchRow]:
    """Return the number of waits in a part of the step, all together and by line."""
    unit = "waits per step"
    rows = [make_row(part, unit, [lines.total()], labels={"part": part})]
    return rows + [
        make_row(f"{part}: {line}", unit, [count], labels={"part": part, "line": line})
        for line, count in lines.most_common()
    ]


@contextmanager
def counted(lines: Counter[str], device: torch.device) -> Iterator[None]:
    """Count by line where the host waits in the block; on a CPU, where it reads."""
    if device.type != "cuda":
        with Reads(lines):
            yield
        return

    def show(message: Warning | str, *rest: Any) -> None:
        if "synchroniz" in str(message):
            lines[calling_line()] += 1

    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(), patch.object(warnings, "showwarning", show):
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Reads(TorchDispatchMode):
    """Counts operations whose result the host reads."""

    def __init__(self, lines: Counter[str]) -> None:
        super().__init__()
        self.lines = lines

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and count it where it is a read."""
        if reads_values(name_of(function), args):
            self.lines[calling_line()] += 1
        return function(*args, **(kwargs or {}))


def calling_line() -> str:
    """Return the innermost line of this project that is at work and, where it is another, the innermost of all."""
    frames = [frame for frame in traceback.extract_stack() if not skipped(frame.filename)]
    last = frames[-1]
    ours = [frame for frame in frames if "srlm_mega" in frame.filename]
    own = ours[-1] if ours else last
    via = "" if own is last else f", by {short(last.filename)}:{last.lineno}"
    return f"{short(own.filename)}:{own.lineno}{via}"


def skipped(file: str) -> bool:
    """Tell whether a frame is of the counting itself."""
    return file == __file__ or file.endswith(COUNTING)


if __name__ == "__main__":
    typer.run(main)
