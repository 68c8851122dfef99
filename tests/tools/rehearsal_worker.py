"""One of two ranks over gloo: takes for real what a rehearsal takes, and writes what it measured. OUT"""

import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rehearsal_cases import LAYOUTS, configuration

from srlm_mega.gpus import find_gpu
from srlm_mega.tools.rehearsal.rehearsed_rank import Rehearsal, axis_of
from srlm_mega.tools.rehearsal.watch import StepWatch
from srlm_mega.training.checkpoint import Checkpoints
from srlm_mega.training.topology import Topology, process_group


def as_they_are(value: Any) -> Any:
    """Real tensors."""
    return value


def main() -> None:
    """Every layout in one launch."""
    found = {}
    with process_group(configuration("PP 2").trainer):
        for name in LAYOUTS:
            config = configuration(name)
            with Topology.start(config.parallel, config.trainer, 0) as topology:
                rehearsal = replace(Rehearsal.prepare(config, topology, find_gpu("h100")), most_micro_batches=1000)
                watch = StepWatch(partial(axis_of, topology))
                with watch:
                    rehearsal.run(watch, as_they_are, Checkpoints(Path(sys.argv[1]), topology, config.trainer))
                found[name] = {
                    "peak": watch.peak,
                    "phases": {phase.name: phase.peak_bytes for phase in watch.phases()},
                    "messages": [asdict(message) for message in watch.messages()],
                }
                rank = topology.rank
        (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found))


main()
