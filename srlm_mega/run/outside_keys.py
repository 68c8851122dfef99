"""The keys of the outside files that the stages to be made will read: a file that was read may be gone."""

from collections.abc import Collection, Sequence
from pathlib import Path

from srlm_mega.config import Config
from srlm_mega.config.file import read_yaml
from srlm_mega.config.knobs import flat, knobs
from srlm_mega.run.identity import RUBRIC, within
from srlm_mega.run.plan import Stage
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import BASE, PROMPTS, SEED

READ_MODEL = (SEED, BASE)  # the kinds of stages that read the files which section `model` names


def keys_read_by(missing: Sequence[Stage], finished: Collection[str], config: Config, run: RunDir) -> set[str]:
    """Return the dotted keys of the outside files that the missing stages read, without those of which the run has a
    copy in place of the file."""
    read = {
        key
        for key in knobs()
        for stage in missing
        if within(key, stage.config) and (stage.kind in READ_MODEL or not key.startswith("model."))
    }
    if "seed" in finished and kept_rubric(config, run) is not None:  # --redo seed removes the copy
        read.discard(RUBRIC)
    if "seed" in finished and (run.output("seed") / "prompts.jsonl").is_file():  # an older version kept them there
        read.discard("prompts.path")
    if PROMPTS.of(1) in finished:  # maybe by the other generator, whose file or model nothing reads any more
        read.discard("prompts.writer" if config.prompts.generator == "file" else "prompts.path")
    return read


def kept_rubric(config: Config, run: RunDir) -> bytes | None:
    """Return the run's copy of a judge's template whose file is gone; None where the file is there, or the copy is of
    another one."""
    template, kept = config.judge.template, run.rubric_in_force  # which is refused, if damaged, in any case
    if not isinstance(template, Path) or template.exists() or not run.config_file.is_file():
        return None
    begun = flat(read_yaml(run.config_file)).get(RUBRIC)
    return kept if begun == str(template) else None
