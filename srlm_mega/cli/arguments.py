"""What several commands of `srlm` take."""

from pathlib import Path
from typing import Annotated

import typer

from srlm_mega.errors import UserError

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigFile = Annotated[Path, typer.Argument(help="YAML file, or a preset's name, for example toy_cpu.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value", metavar="[OVERRIDES]...")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, for example runs/toy.")]


def existing_run(run: Path) -> Path:
    """The folder, if it is a run's."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml. `srlm run CONFIG` makes one.")
    return run
