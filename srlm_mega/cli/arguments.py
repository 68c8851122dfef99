"""Arguments that several commands of `srlm` take."""

from pathlib import Path
from typing import Annotated

import typer

from srlm_mega.errors import UserError

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


def existing_run(run: Path) -> Path:
    """Return the folder. UserError if it is not a run's."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml. `srlm run CONFIG` makes one.")
    return run


ConfigFile = Annotated[Path, typer.Argument(help="YAML file or preset, for example toy_cpu.", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Keys to set, as section.key=value.", metavar="OVERRIDES")]
RunFolder = Annotated[
    Path, typer.Argument(help="Run folder, for example runs/toy.", metavar="RUN", callback=existing_run)
]
