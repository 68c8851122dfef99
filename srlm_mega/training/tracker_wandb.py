"""Metrics in Weights & Biases. Its environment variables (WANDB_API_KEY, WANDB_MODE=offline, ...) apply."""

from collections.abc import Mapping

import wandb

from srlm_mega.config import Config
from srlm_mega.errors import UserError


class WandbTracker:
    """One run of the project, with its files in RUN/logs/wandb."""

    def __init__(self, project: str, name: str, run_id: str, config: Config) -> None:
        logs = config.run.dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                dir=str(logs),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise UserError(
                f"tracking.wandb_project={project}: {error}. Log in (`wandb login`), set WANDB_MODE=offline, "
                "or leave wandb_project out"
            ) from None
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics. They are sent in the background: a server that is away does not stop training."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """Wait until all metrics are sent (offline: written)."""
        self._run.finish()
