"""DPO steps with the fewest packs and with as many as fill the pipeline, in turn, beside what the plan's rule says.

torchrun --standalone --nproc-per-node=2 tools/scripts/bench_packs.py toy_cpu dpo.packed_sequence_size=8192
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

from srlm_mega.config.file import find_file, load_config
from srlm_mega.tools.bench_training import Bench, TrainingRequest
from srlm_mega.training.dpo import DpoObjective
from srlm_mega.training.packing import Pipelines
from srlm_mega.training.topology import Topology, process_group

STEPS, WARMUP = 20, 2


def main() -> None:
    """Print the ratio of every step's seconds, and of the positions' time that is planned for its packs."""
    config = load_config(find_file(Path(sys.argv[1])), sys.argv[2:])
    chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    measured, planned, numbers = list[float](), list[float](), list[int]()
    with process_group(config.trainer), Topology.start(config.parallel, config.trainer, 0) as topology:
        bench = Bench(config, TrainingRequest("dpo", STEPS, WARMUP, False, None, None), topology)
        pipelines = Pipelines(topology.dp_size, topology.pp_size, chunks)
        assert isinstance(bench.objective, DpoObjective)
        for number in range(WARMUP + STEPS):
            seconds, positions = [], []
            for section in (config.dpo.model_copy(update={"packs": packs}) for packs in ("fewest", "auto")):
                step = replace(bench.objective, section=section).prepare(bench.indices(number))
                topology.barrier()
                began = perf_counter()
                bench.trainer.step(bench.objective, step, number + 2)  # from 2: the first loss is not ln 2
                topology.barrier()
                seconds.append(perf_counter() - began)
                numbers.append(len(step.micro_batches))
                length = step.micro_batches[0].batch.tokens.numel()
                positions.append(pipelines.positions(numbers[-1] * topology.dp_size, length))
            measured.append(seconds[0] / seconds[1])
            planned.append(positions[0] / positions[1])
        if topology.is_main:
            low, *_, high = quantiles(measured[WARMUP:], n=10)
            print(
                f"{median(numbers[::2]):g} and {median(numbers[1::2]):g} packs: {median(measured[WARMUP:]):.2f} times "
                f"faster [{low:.2f}, {high:.2f}], planned {median(planned):.2f}; load {os.getloadavg()[0]:.1f}"
            )


if __name__ == "__main__":
    main()
