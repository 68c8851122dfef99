"""What a stage's function is given, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from srlm_mega.config import Config
from srlm_mega.run.plan import Stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir


@dataclass(frozen=True)
class Work:
    """What a stage's function gets: where to read, where to write (`out`), and how to say how far it is."""

    run: RunDir
    config: Config
    stage: Stage
    out: Path
    progress: Progress

    def read(self, stage: str, file: str) -> Path:
        """A file of a finished input."""
        assert stage in self.stage.inputs, f"{self.stage.name} reads {stage}, which is not among its inputs"
        return self.run.output(stage) / file

    @property
    def round(self) -> int:
        """The number of the stage's round."""
        return self.stage.round


@dataclass(frozen=True)
class Done:
    """What a stage's function returns: records written, and counts worth keeping in the manifest."""

    rows: int = 0
    counts: Mapping[str, float] = field(default_factory=dict)
