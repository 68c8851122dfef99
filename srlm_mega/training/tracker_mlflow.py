"""Metrics in MLflow: on a tracking server, or in any other store that its URI can name."""

import time
from collections.abc import Callable, Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from srlm_mega.config import Config
from srlm_mega.config.file import leaves
from srlm_mega.errors import UserError

ID_TAG = "srlm_tracking_id"


class MlflowTracker:
    """One MLflow run per stage, in the experiment named like the run folder."""

    def __init__(self, uri: str, name: str, run_id: str, config: Config) -> None:
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._run_id = find_or_create(self._client, name, run_id, config)
        except MlflowException as error:
            raise UserError(
                f"tracking.mlflow_tracking_uri={uri}: {error.message}. Correct it, or leave it out"
            ) from None
        self._lost = False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step's metrics."""
        now = int(time.time() * 1000)
        rows = [Metric(key, value, now, step) for key, value in metrics.items()]
        self._send(f"step {step}", lambda: self._client.log_batch(self._run_id, rows))

    def close(self) -> None:
        """Mark the run as ended."""
        self._send("the end of the run", lambda: self._client.set_terminated(self._run_id))

    def _send(self, what: str, send: Callable[[], object]) -> None:
        """Call `send`. A server that went away does not stop training: nothing more is sent to it."""
        if self._lost:
            return
        try:
            send()
        except MlflowException as error:
            self._lost = True
            print(f"MLflow did not take {what} ({error}); metrics.jsonl has everything", flush=True)


def find_or_create(client: MlflowClient, name: str, run_id: str, config: Config) -> str:
    """Return MLflow's id of the stage's run: the one that a killed attempt started, or a new one."""
    experiment = client.get_experiment_by_name(config.run.dir.name)
    experiment_id: str = (
        client.create_experiment(config.run.dir.name) if experiment is None else experiment.experiment_id
    )
    begun = client.search_runs([experiment_id], filter_string=f"tags.{ID_TAG} = '{run_id}'")
    run = begun[0] if begun else client.create_run(experiment_id, run_name=name, tags={ID_TAG: run_id})
    mlflow_id: str = run.info.run_id
    if not begun:
        for key, value in leaves(config).items():
            client.log_param(mlflow_id, key, value)
    return mlflow_id
