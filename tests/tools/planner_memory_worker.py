"""Two DPO steps of the trainer in this process, and the most bytes that its tensors took: prints them."""

import sys
from pathlib import Path

from srlm_mega.config.file import load_config
from srlm_mega.tools.bench_training import Bench, TrainingRequest
from srlm_mega.tools.rehearsal.watch import StepWatch
from srlm_mega.training.topology import Topology, process_group


def main() -> None:
    """CONFIG [overrides]."""
    config = load_config(Path(sys.argv[1]), sys.argv[2:])
    request = TrainingRequest("dpo", 1, 1, False, None, None)
    with (
        process_group(config.trainer),
        Topology.start(config.parallel, config.trainer, 0) as topology,
        StepWatch(lambda group: "") as watch,
    ):
        with watch.phase("build"):
            bench = Bench(config, request, topology)
        with watch.phase("steps"):
            for number in range(2):
                bench.take_step(number)
        build, steps = watch.phases()
        print("bytes", build.end_bytes, steps.end_bytes, watch.peak)


main()
