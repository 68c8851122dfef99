"""A run in a notebook: the records of its finished stages, read one at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.errors import UserError
from srlm_mega.evaluation.results import ModelEvaluation
from srlm_mega.records import Candidate, Judgement, PreferencePair, Prompt, parse_line, read_jsonl
from srlm_mega.run.files import existing_run
from srlm_mega.run.logs import read_metrics
from srlm_mega.run.plan import plan
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import BASE, CANDIDATES, EVALUATION, JUDGEMENTS, PAIRS, PROMPTS, StageKind

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingStep:
    """One optimizer step of a model's training: its number, from 1, and its figures by the names of metrics.jsonl
    (`loss`, `rewards/margins`, ...; losses in nats). A figure that was NaN or inf is None."""

    model: str
    step: int
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class FinishedModel:
    """A model of a run: its name (M1), its Hugging Face folder, the hash by which records name it (`model_hash`), and
    its evaluation, None where it was not measured (yet)."""

    name: str
    folder: Path
    model_hash: str
    evaluation: ModelEvaluation | None


@dataclass(frozen=True)
class Run:
    """A run's folder and its configuration. A `round` is a number from 1; without one, records of all rounds come in
    order. Only what is finished is read, and what differs from its manifest raises UserError before its first record,
    as does a round that is asked for and not finished. Nothing is written."""

    folder: Path
    config: Config

    def prompts(self, round: int | None = None) -> Iterator[Prompt]:
        """Yield the prompts that rounds answer."""
        return self._records(PROMPTS, "prompts.jsonl", Prompt, round)

    def candidates(self, round: int | None = None) -> Iterator[Candidate]:
        """Yield the sampled responses."""
        return self._records(CANDIDATES, "candidates.jsonl", Candidate, round)

    def judgements(self, round: int | None = None) -> Iterator[Judgement]:
        """Yield the judgements, several of each candidate."""
        return self._records(JUDGEMENTS, "judgements.jsonl", Judgement, round)

    def pairs(self, round: int | None = None) -> Iterator[PreferencePair]:
        """Yield the preference pairs that rounds train on."""
        return self._records(PAIRS, "pairs.jsonl", PreferencePair, round)

    def models(self) -> Iterator[FinishedModel]:
        """Yield the finished models in the order of their training."""
        run = RunDir(self.folder)
        for stage in plan(self.config):
            if (stage.kind.trains or stage.kind is BASE) and (made := run.verified(stage.name)) is not None:
                file = run.output(EVALUATION.of(stage.name)) / "evaluation.json"
                measured = run.verified(EVALUATION.of(stage.name)) is not None
                evaluation = parse_line(ModelEvaluation, file.read_bytes()) if measured else None
                yield FinishedModel(stage.name, run.weights(stage.name), made.digest, evaluation)

    def metrics(self, model: str) -> Iterator[TrainingStep]:
        """Yield the optimizer steps of a model's training, finished or not, as far as they are logged."""
        run = RunDir(self.folder)
        trained = [stage.name for stage in plan(self.config) if stage.kind.trains]
        if model not in trained:
            raise UserError(f"{model} is no model that {self.folder} trains: {', '.join(trained)}")
        folder = run.partial(model) if run.manifest(model) is None else run.output(model)
        for row in read_metrics(folder / "metrics.jsonl"):
            if (step := row.pop("step", None)) is not None:
                yield TrainingStep(model, int(step), row)

    def _records(self, kind: StageKind, file: str, record: type[T], round: int | None) -> Iterator[T]:
        run = RunDir(self.folder)
        for number in range(1, self.config.run.rounds + 1) if round is None else (round,):
            name = kind.of(number)
            if run.verified(name) is not None:
                yield from read_jsonl(run.output(name) / file, record)
            elif round is not None:
                raise UserError(f"{name} is not finished in {self.folder}: `srlm run` makes it")


def open_run(folder: Path | str) -> Run:
    """Open a run's folder. UserError where it is none."""
    run = RunDir(existing_run(Path(folder)))
    return Run(run.root, load_config(run.config_file))
