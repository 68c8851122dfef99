"""Whether a run is as it was written: for commands that show it, and change nothing."""

from collections.abc import Iterator

from srlm_mega.config import Config
from srlm_mega.config.compatibility import listed
from srlm_mega.config.file import load_config
from srlm_mega.errors import UserError
from srlm_mega.run.identity import THREADS, changes_since
from srlm_mega.run.plan import Stage, plan
from srlm_mega.run.run_dir import RunDir


def check_sound(run: RunDir) -> None:
    """Raise UserError for the first of the run's damages."""
    for _, damage in damages(run):
        raise UserError(damage)


def damages(run: RunDir) -> Iterator[tuple[str, str]]:
    """Yield the name of each stage whose finished output differs from its manifest, or was made with another
    configuration than the run's config.yaml says, and how. Files above 256 MiB are compared by size."""
    config = load_config(run.config_file)
    for stage in plan(config):
        if (found := unsoundness(stage, config, run)) is not None:
            yield stage.name, found


def unsoundness(stage: Stage, config: Config, run: RunDir) -> str | None:
    """Return what is wrong with a stage's output; None where nothing is, or it is not finished."""
    try:
        manifest = run.manifest(stage.name)
        if manifest is None:
            run.check_unfinished(stage.name)
            return None
        run.verify(stage.name, quick=True)
    except UserError as error:
        return str(error)
    changes = changes_since(manifest, stage, config)
    changes.pop(THREADS, None)  # an older run did not record its cores, and this machine may have others
    if changes:
        return f"{run.config_file} is not what {stage.name} was made with; restore it:{listed(changes)}"
    return None
