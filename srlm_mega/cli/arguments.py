"""Arguments that several commands of `srlm` take."""

from pathlib import Path
from typing import Annotated

import typer

from srlm_mega.run.files import check_place, existing_run

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


def sound_run(run: Path) -> Path:
    """Return the folder. UserError if it is not a run's, or if something in it was altered since it was made."""
    from srlm_mega.run.run_dir import RunDir
    from srlm_mega.run.soundness import check_sound

    check_sound(RunDir(existing_run(run)))
    return run


def file_place(path: Path | None) -> Path | None:
    """Return the path of a file that a command writes at its end. UserError or OSError where it could not be."""
    if path is not None:
        check_place(path)
    return path


def folder_place(path: Path) -> Path:
    """Return the path of a folder that a command writes. UserError or OSError where it could not be."""
    check_place(path, is_folder=True)
    return path


GpuName = Annotated[str | None, typer.Option("--gpu", help="Kind of GPU: a100, h100, h200, b200, ... [default: h100]")]
GpuFilePath = Annotated[
    Path | None, typer.Option("--gpu-file", help="YAML file that describes another GPU; docs/planner.md has its keys.")
]
ConfigFile = Annotated[Path, typer.Argument(help="YAML file or preset, for example toy_cpu.", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Keys to set, as section.key=value.", metavar="OVERRIDES")]
RunFolder = Annotated[
    Path, typer.Argument(help="Run folder, for example runs/toy.", metavar="RUN", callback=existing_run)
]
SoundRunFolder = Annotated[
    Path, typer.Argument(help="Run folder, for example runs/toy.", metavar="RUN", callback=sound_run)
]
