"""`srlm status`: the finished outputs of a run, the progress of the others, the time left. It only reads files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from srlm_mega.config.file import load_config
from srlm_mega.evaluation.health_limits import read_health
from srlm_mega.run.logs import read_metrics
from srlm_mega.run.manifest import Manifest
from srlm_mega.run.plan import Stage, plan
from srlm_mega.run.presence import read_controller
from srlm_mega.run.progress import read_progress
from srlm_mega.run.run_dir import TRAINING_STATE, RunDir
from srlm_mega.run.stage_kinds import PAIRS, StageKind, round_folder
from srlm_mega.text import duration
from srlm_mega.training.checkpoint_files import complete_steps

TAIL_BYTES = 1 << 16
RECENT_STEPS = 20
SHARES = {  # label: counts of a round's pairs stage, a part and its whole
    "pairs": ("pairs", "prompts"),
    "ties": ("tied", "prompts"),
    "unparsed": ("unparsed", "judgements"),
    "truncated": ("truncated", "candidates"),
}


@dataclass(frozen=True)
class StageStatus:
    """State of one stage: `done` of `total` units while partial; `seconds` it took or may still take, None: unknown. A
    damaged one is not as it was written, and `note` says how."""

    name: str
    state: Literal["done", "damaged", "partial", "missing"]
    done: int
    total: int
    unit: str
    note: str
    seconds: float | None


@dataclass(frozen=True)
class Losses:
    """Figures of a model's newest optimiser step."""

    model: str
    step: int
    figures: Mapping[str, float | None]


@dataclass(frozen=True)
class RoundShares:
    """Shares of a round whose pairs are made; `beyond` names the figures of its health.json that are beyond a limit."""

    round: str
    shares: Mapping[str, float]
    beyond: tuple[str, ...]


@dataclass(frozen=True)
class RunStatus:
    """State of a run. `works` says whether `srlm run` is at work; `ended` says how the newest one ended, and is empty
    while it works. `seconds_left` is None if unknown."""

    run: str
    works: bool
    ended: str
    stages: tuple[StageStatus, ...]
    seconds_left: float | None
    losses: tuple[Losses, ...]
    health: tuple[RoundShares, ...]


def read_status(folder: Path, damaged: Mapping[str, str]) -> RunStatus:
    """Read the present state of a run; `damaged`: `damages` when one began to look, by stage."""
    run = RunDir(folder)
    controller = read_controller(run)
    works = controller is not None and controller.works
    stages = plan(load_config(run.config_in_force if works else run.config_file))
    sound = [stage for stage in stages if stage.name not in damaged]
    finished = {stage: manifest for stage in sound if (manifest := run.manifest(stage.name)) is not None}
    states = tuple(
        StageStatus(stage.name, "damaged", 0, 0, "", damaged[stage.name], None)
        if stage.name in damaged
        else state_of(stage, run, finished)
        for stage in stages
    )
    left = [one.seconds for one in states if one.state != "done"]
    known = [seconds for seconds in left if seconds is not None]
    models = [stage.name for stage in stages if stage.kind.trains]
    trained = [losses for name in models if (losses := newest_losses(run, name)) is not None]
    return RunStatus(
        run=str(folder),
        works=works,
        ended="" if controller is None else controller.ended,
        stages=states,
        seconds_left=sum(known) if len(known) == len(left) else None,
        losses=tuple(trained[-2:]),
        health=tuple(shares_of(run, stage, manifest) for stage, manifest in finished.items() if stage.kind is PAIRS),
    )


def state_of(stage: Stage, run: RunDir, finished: Mapping[Stage, Manifest]) -> StageStatus:
    """Read the state of one stage; `finished` are the manifests of the finished ones."""
    manifest = finished.get(stage)
    if manifest is not None:
        return StageStatus(stage.name, "done", manifest.rows, manifest.rows, "", "", manifest.seconds)
    usual = usual_seconds(stage.kind, finished)
    if not run.partial(stage.name).exists():
        return StageStatus(stage.name, "missing", 0, 0, "", "", usual)
    progress = read_progress(run.progress_file(stage.name))
    seconds = None if usual is None or not progress.total else usual * (1 - progress.done / progress.total)
    note = progress.note
    step = step_seconds(run.partial(stage.name) / "metrics.jsonl") if stage.kind.trains else None
    if step is not None and progress.total:
        seconds = step * (progress.total - progress.done)
        note = f"{note}, {duration(seconds)} left"
    return StageStatus(stage.name, "partial", progress.done, progress.total, progress.unit, note, seconds)


def usual_seconds(kind: StageKind, finished: Mapping[Stage, Manifest]) -> float | None:
    """Return the seconds of the newest finished stage of this kind, an estimate for the next one; None without one."""
    same = [manifest.seconds for stage, manifest in finished.items() if stage.kind is kind]
    return same[-1] if same else None


def newest_losses(run: RunDir, model: str) -> Losses | None:
    """Read the newest losses of a model that is trained or being trained, None without any."""
    for folder in (run.output(model), run.partial(model)):
        for row in reversed(read_metrics(folder / "metrics.jsonl", TAIL_BYTES)):
            if (step := row.get("step")) is not None:
                keys = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm")
                return Losses(model, int(step), {key: row[key] for key in keys if key in row})
    return None


def step_seconds(path: Path) -> float | None:
    """Return the median of the newest steps' seconds, None without any."""
    rows = read_metrics(path, TAIL_BYTES)[-RECENT_STEPS:]
    newest = [seconds for row in rows if (seconds := row.get("step_seconds")) is not None]
    return median(newest) if newest else None


def shares_of(run: RunDir, stage: Stage, manifest: Manifest) -> RoundShares:
    """Return a round's shares from the counts of its pairs, and the figures of its health that are beyond a limit."""
    shares = {
        label: manifest.counts[part] / manifest.counts[whole]
        for label, (part, whole) in SHARES.items()
        if manifest.counts.get(whole)
    }
    health = read_health(run, stage.round)
    figures = {} if health is None else health.beyond("stop") | health.beyond("warn")
    beyond = tuple(
        f"{one.state}: {key} {'NaN or inf' if one.value is None else f'{one.value:.3g}'}"
        for key, one in figures.items()
    )
    return RoundShares(round_folder(stage.round), shares, beyond)


def share_done(stages: Sequence[StageStatus]) -> str:
    """Return '12 of 17 stages'."""
    return f"{sum(one.state == 'done' for one in stages)} of {len(stages)} stages"


def progress_line(folder: Path) -> str:
    """Return the finished stages, and the newest checkpoint or the number of shards of unfinished ones, in one line."""
    run = RunDir(folder)
    if not run.config_file.is_file():
        return "nothing"
    parts = []
    for stage in plan(load_config(run.config_in_force)):
        partial = run.partial(stage.name)
        if run.manifest(stage.name) is not None:
            parts.append(stage.name)
        elif stage.kind.trains:
            parts += [f"{stage.name} step {step}" for step in complete_steps(partial / TRAINING_STATE)[-1:]]
        elif shards := len(list(partial.glob("*.shards/shard_*[0-9].jsonl"))):
            parts.append(f"{stage.name} {shards} shards")
    return ", ".join(parts) or "nothing"
