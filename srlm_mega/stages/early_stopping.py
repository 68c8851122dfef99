"""Comparisons while training is paused: the newest checkpoint answers the validation prompts, and a judge compares its
responses with those of the best checkpoint before it. The verdict is a file that the training reads."""

from collections.abc import Container, Iterator
from contextlib import closing
from functools import partial

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.evaluation.checkpoint_choice import START, EarlyStoppingFiles, decide, kept_step
from srlm_mega.evaluation.results import Comparison
from srlm_mega.records import Prompt, read_jsonl
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.sealed_file import has_its_seal, is_whole
from srlm_mega.run.stage_kinds import model_name
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.compare_responses import compare, matches_of
from srlm_mega.stages.judges import local_judge, open_judge
from srlm_mega.stages.responses import Writer, respond
from srlm_mega.stages.run_stages import record_failure
from srlm_mega.stages.sampling_task import report_progress
from srlm_mega.stages.work import Work


def compare_checkpoints(run: RunDir, name: str) -> int:
    """Do the comparison that a paused training stage waits for. Returns the exit code; an error's message is in the
    progress file. UserError when no checkpoint waits."""
    with run.lock(or_by_starter=True):
        return compare_waiting(run, name)


def compare_waiting(run: RunDir, name: str) -> int:
    """Do the comparison in a run that is locked."""
    config = load_config(run.config_in_force)
    progress = Progress(run.progress_file(f"{name}/early_stopping"))
    samplers = Samplers(config, run.replicas)
    work = Work(run, config, find_stage(config, name), run.partial(name), progress, samplers)
    files = EarlyStoppingFiles(work.out)
    step = files.waiting()
    if step is None:
        raise UserError(f"{name} has no checkpoint that waits for a comparison: `srlm run` resumes it by itself")
    is_whole(files.verdict(step), unsealed=True)  # which says of one that is there that it is made again
    try:
        for name in work.stage.inputs:
            run.verify(name, quick=True)
        checkpoints_judge(config, run)  # another one is refused before anything is sampled for it
        with closing(samplers):
            sample_responses(work, files, step)
            write_verdict(work, files, step)
    except (UserError, CannotContinue, OSError) as error:
        return record_failure(error, progress)
    return 0


def sample_responses(work: Work, files: EarlyStoppingFiles, step: int) -> None:
    """Sample greedy responses of the waiting checkpoint, and of the model that training started from when that is the
    best so far and has not answered yet."""
    work.run.verify("seed", quick=True)
    prompts, start = list(read_jsonl(work.read("seed", "validation.jsonl"), Prompt)), model_name(work.round)
    for one in (kept_step(files.verdicts()), step):
        if not has_its_seal(files.responses(one)):  # `respond` says of one that is there that it is made again
            files.step_folder(one).mkdir(parents=True, exist_ok=True)
            on_progress = partial(report_progress, work, f"responses of step {one}")
            if one == START:
                work.run.verify(start, quick=False)
                writer = Writer(work.run.digest(start), work.run.weights(start))
            else:
                check_export(work, files, one)
                writer = Writer(f"{work.stage.name} step {one}", files.export(one))
            respond(work.samplers, writer, prompts, 0.0, 1.0, files.responses(one), on_progress)


def check_export(work: Work, files: EarlyStoppingFiles, step: int) -> None:
    """Raise UserError when a checkpoint's Hugging Face folder is not as it was exported."""
    if (found := files.damage(step, files.export(step))) is not None:
        raise UserError(f"{found}. {work.run.remedy(work.stage.name)}")


def checkpoints_judge(config: Config, run: RunDir, redone: Container[str] = ()) -> Writer | None:
    """Return the model that judges checkpoints, None where an endpoint has it. Every byte is read. UserError as for
    `local_judge`, by comparisons in stages that are not `redone`."""
    assert config.early_stopping is not None, "no early stopping"
    settings, earlier = config.early_stopping.judge, judged_checkpoints(config, run, redone)
    return local_judge(settings, config.model.allow_unverified, run, earlier)


def judged_checkpoints(config: Config, run: RunDir, redone: Container[str]) -> Iterator[tuple[str, Comparison]]:
    """Yield the comparisons of the run's checkpoints so far, by the stage that trains or trained them."""
    for name in map(model_name, range(1, config.run.rounds + 2)):
        for folder in (run.output(name), run.partial(name)) if name not in redone else ():
            for verdict in EarlyStoppingFiles(folder).verdicts():
                yield name, verdict.comparison


def write_verdict(work: Work, files: EarlyStoppingFiles, step: int) -> None:
    """Ask the judge, decide, and write the verdict. CannotContinue when too few prompts have a verdict."""
    settings, verdicts, exported = work.config.early_stopping, files.verdicts(), files.exported(step)
    assert settings is not None and exported is not None, f"no early stopping, or no export of step {step}"
    against, file = kept_step(verdicts), files.judgements(step)
    taken = checkpoints_judge(work.config, work.run)
    opener = partial(open_judge, settings.judge, work.samplers, work.config.model.allow_unverified, taken=taken)
    names, on_progress = (f"step {step}", f"step {against}"), partial(report_progress, work, "questions to the judge")
    matches = matches_of(files.responses(step), files.responses(against))
    comparison = compare(names, matches, opener, file, on_progress)
    decided = 0 if comparison.result is None else comparison.result.prompts
    if decided < settings.min_valid_share * comparison.prompts:
        raise CannotContinue(
            f"the judge {comparison.judge} gave a verdict in both orders on {decided} of {comparison.prompts} prompts, "
            f"needed {settings.min_valid_share:.0%} (early_stopping.min_valid_share): {comparison.unparsed} of its "
            f"answers have no `Verdict: A`, `B` or `tie` ({comparison.truncated} were cut off), {comparison.failed} "
            f"prompts failed, {comparison.too_long} were too long. No verdict is invented. Read {file}; to ask the "
            "judge again, remove this file and give the same command"
        )
    verdict = decide(settings, step, exported.max_steps, comparison, verdicts)
    print(f"{work.stage.name}: {verdict.reason}", flush=True)
    files.write_verdict(verdict)
