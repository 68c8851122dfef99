"""Training with pauses for early stopping: train up to a checkpoint, pause while it is compared, then resume or end.

Sampling and training share no process, and a set of GPUs holds only one of them at a time. So training ends its
processes at a pause, and the controller starts the comparison and then training again.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from srlm_mega.errors import TrainingPaused, UserError
from srlm_mega.evaluation.checkpoint_choice import (
    START,
    EarlyStoppingFiles,
    Exported,
    Verdict,
    comparison_steps,
    kept_step,
)
from srlm_mega.run.files import discard, fsync
from srlm_mega.run.run_dir import TRAINING_STATE, files_below
from srlm_mega.run.sealed_file import has_its_seal, is_whole
from srlm_mega.stages.work import Done, Work
from srlm_mega.training.checkpoint_files import complete_steps
from srlm_mega.training.topology import Topology
from srlm_mega.training.trainer import TrainingPart, TrainingSummary


def train_with_pauses(
    work: Work, topology: Topology, start: Path, steps: int, train: Callable[[TrainingPart], TrainingSummary]
) -> Done:
    """Train up to the next checkpoint to compare, and raise TrainingPaused; once a verdict ends training, make the best
    checkpoint the stage's model and return the counts. `steps`: optimiser steps of the whole training."""
    settings, files = work.config.early_stopping, EarlyStoppingFiles(work.out)
    assert settings is not None, "training with pauses without early stopping"
    compared = comparison_steps(settings.eval_interval, steps)
    # One rank looks, so that all ranks decide the same while files change.
    verdicts = topology.all_gather(files.verdicts() if topology.is_main else None)[0]
    assert verdicts is not None
    check_none_lost(work, files, verdicts, compared)
    if verdicts and verdicts[-1].stop:
        topology.beat("export", "the best checkpoint")
        if topology.is_main:
            keep_best(work, files, verdicts, start)
        topology.barrier()
        return summary(work, files, verdicts, steps)
    step = compared[len(verdicts)]
    waits = topology.all_gather(is_waiting(files, step) if topology.is_main else None)[0]
    if not waits:
        trained = topology.all_gather(complete_steps(work.out / TRAINING_STATE) if topology.is_main else None)[0] or [0]
        check_not_beyond(work, files, step, trained[-1])
        if topology.is_main:
            remove_worse(files, verdicts)
        done = train(TrainingPart(step, files.export(step)))
        if topology.is_main:
            make_durable(files.export(step))
            files.write_exported(step, Exported(steps, done.items, done.excluded, done.verified))
        topology.barrier()
    raise TrainingPaused(f"after step {step} of {steps}: its checkpoint is to be compared with the best one before it")


def check_none_lost(work: Work, files: EarlyStoppingFiles, verdicts: list[Verdict], compared: list[int]) -> None:
    """Raise UserError if an earlier one of the steps that are `compared` has no verdict."""
    for step, verdict in zip(compared, verdicts, strict=False):
        if verdict.step != step:
            lost = f"{files.step_folder(step)} is not there, and that of step {verdict.step} is"
            raise UserError(f"{lost}. {work.run.remedy(work.stage.name)}")


def check_not_beyond(work: Work, files: EarlyStoppingFiles, step: int, trained: int) -> None:
    """Raise UserError if the training's newest checkpoint, of step `trained`, is beyond the one to export."""
    if trained > step:
        raise UserError(
            f"{files.export(step)} is to hold the model after step {step}, and the newest checkpoint in "
            f"{work.out / TRAINING_STATE} is of step {trained}: restore what early stopping wrote for step {step}, or "
            f"make the stage again: the same `srlm run` command with {work.run.redo(work.stage.name)}"
        )


def is_waiting(files: EarlyStoppingFiles, step: int) -> bool:
    """Tell whether a checkpoint is exported and only its comparison is missing. One that is not as it was exported is
    removed, unless it has answered already: the training's own checkpoint of this step is there to export it again."""
    if not is_whole(files.record(step), unsealed=True):
        return False
    if has_its_seal(files.responses(step)) or (found := files.damage(step, files.export(step))) is None:
        return True
    print(f"{found}: the checkpoint is exported again", flush=True)
    shutil.rmtree(files.step_folder(step))
    return False


def remove_worse(files: EarlyStoppingFiles, verdicts: list[Verdict]) -> None:
    """Remove the weights of checkpoints that were not kept; their responses and judgements stay."""
    for verdict in verdicts:
        if verdict.step != kept_step(verdicts):
            shutil.rmtree(files.export(verdict.step), ignore_errors=True)


def keep_best(work: Work, files: EarlyStoppingFiles, verdicts: list[Verdict], start: Path) -> None:
    """Make the best checkpoint the stage's model, and remove the weights of the others. UserError when it is not as it
    was exported."""
    kept, final = kept_step(verdicts), work.out / "huggingface"
    if kept == START:
        for path in (files.export(START), final):  # left by a killed attempt
            discard(path)
        shutil.copytree(start, files.export(START))
    if not final.exists():  # else a killed attempt got this far
        os.rename(files.export(kept), final)
    if (found := files.damage(kept, final)) is not None:
        raise UserError(f"{found}. {work.run.remedy(work.stage.name)}")
    remove_worse(files, verdicts)


def summary(work: Work, files: EarlyStoppingFiles, verdicts: list[Verdict], steps: int) -> Done:
    """Return the manifest's counts: what was trained, which step was kept, and the score of each comparison."""
    trained = verdicts[-1].step
    exported = files.exported(trained)
    if exported is None:
        raise UserError(f"{files.record(trained)} is missing or damaged. {work.run.remedy(work.stage.name)}")
    counts: dict[str, float] = {
        "steps": trained,
        "max_steps": steps,
        "kept_step": kept_step(verdicts),
        "comparisons": len(verdicts),
        "excluded": exported.excluded,
        "verified_tensors": exported.verified,
    }
    scores = {
        f"score_of_step_{verdict.step}": verdict.comparison.result.score
        for verdict in verdicts
        if verdict.comparison.result is not None
    }
    return Done(exported.items, counts | scores)


def make_durable(folder: Path) -> None:
    """Sync a folder's files to the disk."""
    for path in files_below(folder):
        fsync(path)
    fsync(folder)
