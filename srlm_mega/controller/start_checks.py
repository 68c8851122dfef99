"""What a run is refused for before its first stage: everything from outside that the stages to be made will read."""

from collections.abc import Collection, Container, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from srlm_mega.config import Config
from srlm_mega.config.file import check_endpoints, check_trackers
from srlm_mega.config.outside_files import DATA_KEYS, check_outside_files, outside_files
from srlm_mega.controller.stage_process import check_sampler
from srlm_mega.errors import UserError
from srlm_mega.judging.template import JudgeTemplate, load_template
from srlm_mega.run.identity import RUBRIC
from srlm_mega.run.outside_data import data_problem
from srlm_mega.run.outside_keys import READ_MODEL, kept_rubric, keys_read_by
from srlm_mega.run.plan import Stage
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import PROMPTS
from srlm_mega.text import quoted


def check_start(
    missing: Sequence[Stage], finished: frozenset[str], config: Config, run: RunDir, redone: Container[str] = ()
) -> None:
    """Raise UserError if one of the missing stages could not be made: for files, models and templates that cannot be
    used, a judge that is another one than before (but in what is `redone`), prompts that are too few, an endpoint, a
    tracker or a sampler that cannot be reached."""
    read = keys_read_by(missing, finished, config, run)
    check_outside_files(config, read)
    check_data(config, read)
    if RUBRIC in read or "seed" not in finished:
        check_rubric(config)
    if any(stage.kind in READ_MODEL for stage in missing):
        from srlm_mega.stages.seed import read_chat  # it loads tokenizers, which nothing else here needs

        with redirect_stdout(StringIO()):  # which template it takes is for the log of the stage
            read_chat(config.model)
    check_sampled_models(read, config)
    check_same_judges(read, config, run, redone)
    check_given_prompts(missing, finished, config, run)
    check_endpoints(config)
    check_trackers(config)
    check_sampler(missing, config)


def check_rubric(config: Config) -> None:
    """Raise UserError if judge.template cannot be used, and say so if it may not ask for a score as it is read."""
    template, most = config.judge.template, config.judge.max_score
    doubt = load_template(template, most).doubt(most)
    if doubt is not None and template != "toy":  # its models know the form
        shown = f"srlm show template {quoted(template)} --max-score {most}"
        print(f"judge.template {template} {doubt}. `{shown}` shows it filled")


def check_data(config: Config, read: Collection[str]) -> None:
    """Raise UserError with a list of the data that cannot be read: in no known form, empty, or a folder without any.
    The first entry of each is read."""
    data = {key: path for key, path in outside_files(config).items() if key in DATA_KEYS and key in read}
    problems = [f"\n  - {key}: {problem}" for key, path in data.items() if (problem := data_problem(path))]
    if problems:
        raise UserError("data that the configuration names cannot be read:" + "".join(problems))


def check_sampled_models(read: Collection[str], config: Config) -> None:
    """Raise UserError if an outside model that is only sampled, a writer of prompts or a local judge, has a tokenizer
    or a chat template that cannot be used, or was converted and not verified."""
    writer, judges = config.prompts.writer, config.pairwise_judges.items()
    folders = {f"{section}.model": Path(judge.model) for section, judge in judges if judge.endpoint is None}
    if isinstance(writer, Path) and config.prompts.generator == "self_instruct":
        folders["prompts.writer"] = writer
    for key in folders.keys() & read:
        from srlm_mega.chat import Chat  # it loads tokenizers, which nothing else here needs
        from srlm_mega.checkpoints_conversion.verify import check_verified

        try:
            if not config.model.allow_unverified:
                check_verified(folders[key])
            Chat.from_folder(folders[key])
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None


def check_same_judges(read: Collection[str], config: Config, run: RunDir, redone: Container[str]) -> None:
    """Raise UserError if a local judge is another model than the one that has judged in this run. Its bytes are read
    where one has."""
    judges = {f"{section}.model" for section, judge in config.pairwise_judges.items() if judge.endpoint is None}
    if not judges.isdisjoint(read):
        from srlm_mega.stages.compare_responses import evaluations_judge, judged_evaluations
        from srlm_mega.stages.early_stopping import checkpoints_judge, judged_checkpoints

        if config.evaluation.pairwise_judge is not None and any(judged_evaluations(config, run, redone)):
            evaluations_judge(config, run, redone)
        if config.early_stopping is not None and any(judged_checkpoints(config, run, redone)):
            checkpoints_judge(config, run, redone)


def rubric_for(config: Config, run: RunDir) -> bytes:
    """Return the text of the judge's template that the stages to be made take: the configured one or, where that file
    is gone, the run's copy of it. UserError when there is none, or it is no template."""
    kept = kept_rubric(config, run)
    if kept is None:
        return load_template(config.judge.template, config.judge.max_score).text.encode()
    return JudgeTemplate.from_bytes(kept, "that the run has kept").text.encode()


def check_given_prompts(missing: Sequence[Stage], finished: frozenset[str], config: Config, run: RunDir) -> None:
    """Raise UserError if prompts from a file are too few for the rounds that have none yet. Which of them are like the
    seed data, or too long, is known once there are a seed and M0."""
    rounds = sorted(stage.round for stage in missing if stage.kind.place == PROMPTS.place)
    if config.prompts.generator != "file" or not rounds:
        return
    # They load tokenizers and numpy, which nothing else here needs.
    from srlm_mega.chat import Chat
    from srlm_mega.stages.given_prompts import check_bare_file, given_prompts, prompts_of_rounds, seed_prompts_in

    if not {"seed", "M0"} <= finished:
        check_bare_file(config, run, rounds)
        return
    taken = prompts_of_rounds(run, range(1, rounds[0]))
    chat = Chat.from_folder(run.weights("M0"))
    given = given_prompts(config, run, chat, seed_prompts_in(run.output("seed")), taken, None)
    given.check_enough(config, len(taken), rounds)
