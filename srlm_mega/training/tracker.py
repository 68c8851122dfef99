"""Trackers, which get metrics besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow. On the main rank only."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from srlm_mega.config import Config
from srlm_mega.run.manifest import TRACKING_ID


class Tracker(Protocol):
    """A destination of the metrics of each optimizer step, counted from 1."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics."""

    def close(self) -> None:
        """Flush what was written, and close."""


@contextmanager
def open_trackers(config: Config, out: Path, first_step: int) -> Iterator[list[Tracker]]:
    """Open the configured trackers of the stage that builds `out`. A stage that was killed resumes with the same ones,
    and writes its steps from `first_step` on again."""
    tracking = config.tracking
    name = f"{config.run.dir.name}/{out.name.removesuffix('.partial')}"
    with ExitStack() as stack:
        trackers: list[Tracker] = []
        if tracking.tensorboard:
            from srlm_mega.training.tracker_tensorboard import TensorBoardTracker

            trackers.append(stack.enter_context(closing(TensorBoardTracker(out / "tensorboard", first_step))))
        if tracking.wandb_project is not None:
            from srlm_mega.training.tracker_wandb import WandbTracker

            wandb = WandbTracker(tracking.wandb_project, name, tracking_id(out), config)
            trackers.append(stack.enter_context(closing(wandb)))
        if tracking.mlflow_tracking_uri is not None:
            from srlm_mega.training.tracker_mlflow import MlflowTracker

            mlflow = MlflowTracker(tracking.mlflow_tracking_uri, name, tracking_id(out), config)
            trackers.append(stack.enter_context(closing(mlflow)))
        yield trackers


def tracking_id(out: Path) -> str:
    """Return the id of the stage's run at a server. It is created once and stays in the output's folder; a damaged one
    is replaced."""
    path = out / TRACKING_ID
    if not path.is_file() or re.fullmatch(rb"[0-9a-f]{32}", path.read_bytes()) is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8")
