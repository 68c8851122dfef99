"""Run by test_kernels_in_training.py with TRITON_INTERPRET=1: trains a tiny model on the CPU, with kernels or not.

kernels_training_worker.py MODELS OUT
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from small_run import SEED, Layout, config, sequences
from torch import Tensor
from worker import read_metrics

from srlm_mega.kernels import ops
from srlm_mega.kernels.weight_gradient import WeightGradient
from srlm_mega.training.topology import Topology, process_group
from srlm_mega.training.trainer import TrainingJob, train_sft

Metrics = list[dict[str, float]]


def train(start: Path, out: Path) -> Metrics:
    """Two steps of supervised training on one rank."""
    settings = config(Layout(""), 1, train_iters=2)
    with Topology.start(settings.parallel, settings.trainer, SEED) as topology:
        train_sft(TrainingJob(topology, settings, start, out, SEED), settings.sft, sequences())
    return read_metrics(out)


def with_kernels(run: Callable[[], Metrics]) -> Metrics:
    """The same with what CUDA runs, interpreted."""
    with patch.object(ops, "runs_triton", lambda tensor: True):
        return run()


def wrong_gradient(self: WeightGradient, dz: Tensor, x: Tensor) -> None:
    """What the real one adds to Megatron's buffer, one percent too large."""
    add(self, dz * 1.01, x)


add = WeightGradient.add


def main(models: Path, out: Path) -> None:
    """Both models, and a gradient that is wrong."""
    with process_group(config(Layout(""), 1).trainer):
        results = {}
        for name in ("plain", "tied"):
            results[name] = {
                "reference": train(models / name, out / f"{name}_reference"),
                "kernels": with_kernels(lambda name=name: train(models / name, out / f"{name}_kernels")),  # type: ignore[misc]
            }
        with patch.object(WeightGradient, "add", wrong_gradient):
            wrong = with_kernels(lambda: train(models / "plain", out / "wrong"))
        results["wrong"] = {"reference": results["plain"]["reference"], "kernels": wrong}
    (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
