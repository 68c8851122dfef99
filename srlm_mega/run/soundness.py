"""Whether a run is as it was written: for commands that show it, and change nothing."""

from collections.abc import Iterator

from srlm_mega.config.compatibility import listed
from srlm_mega.config.file import load_config
from srlm_mega.errors import UserError
from srlm_mega.run.identity import THREADS, changes_of
from srlm_mega.run.manifest import Manifest
from srlm_mega.run.plan import plan
from srlm_mega.run.run_dir import RunDir


def check_sound(run: RunDir) -> None:
    """Raise UserError for the first of the run's damages."""
    for _, damage in damages(run):
        raise UserError(damage)


def damages(run: RunDir) -> Iterator[tuple[str, str]]:
    """Yield the name of each stage whose finished output differs from its manifest, or was made with another
    configuration than the run's config.yaml says, and how. Files above 256 MiB are compared by size."""
    config = load_config(run.config_file)
    stages, made = plan(config), dict[str, Manifest]()
    for stage in stages:
        try:
            if (manifest := run.verified(stage.name)) is not None:
                made[stage.name] = manifest
        except UserError as error:
            yield stage.name, str(error)
    for name, changes in changes_of(stages, made, config, {}).items():
        changes.pop(THREADS, None)  # an older run did not record its cores, and this machine may have others
        if changes:
            yield name, f"{run.config_file} is not what {name} was made with; restore it:{listed(changes)}"
