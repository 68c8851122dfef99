"""Argument and result of a stage's function."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from srlm_mega.config import Config
from srlm_mega.run.plan import Stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.samplers import Samplers


@dataclass(frozen=True)
class Work:
    """Argument of a stage's function: where to read, where to write (`out`), where to report progress, and the models
    that its process samples."""

    run: RunDir
    config: Config
    stage: Stage
    out: Path
    progress: Progress
    samplers: Samplers

    def read(self, stage: str, file: str) -> Path:
        """Return the path of a file of a finished input. AssertionError for a stage that is not among the inputs."""
        assert stage in self.stage.inputs, f"{self.stage.name} reads {stage}, which is not among its inputs"
        return self.run.output(stage) / file

    @property
    def round(self) -> int:
        """Number of the stage's round."""
        return self.stage.round


@dataclass(frozen=True)
class Done:
    """Result of a stage's function: the number of records written, and counts for the manifest."""

    rows: int = 0
    counts: Mapping[str, float] = field(default_factory=dict)
