"""`srlm rehearse`, and the command that it starts for every rank."""

import re
from pathlib import Path
from typing import Annotated

import typer

from srlm_mega.cli.arguments import ConfigFile, GpuFilePath, GpuName, Overrides
from srlm_mega.errors import UserError


def rehearse(
    config_file: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="0,16,63", help="Ranks to rehearse; default: those that differ.")
    ] = None,
    all_stages: Annotated[bool, typer.Option("--all", help="Rehearse every pipeline stage.")] = False,
    gpu: GpuName = None,
    gpu_file: GpuFilePath = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Take the steps of a training job on this machine, rank by rank, with tensors that have no contents. Says whether
    every rank builds, steps and fits, what holds its memory, what it sends, and where the host waits. Needs no GPU.
    Exit code 2 where a rank fails, does not fit or is tight."""
    from srlm_mega.tools.gpu_file import chosen_gpu
    from srlm_mega.tools.rehearsal.rehearse_command import RehearsalRequest, run

    card = chosen_gpu(gpu, gpu_file)
    request = RehearsalRequest(config_file, tuple(overrides or ()), card, rank_numbers(ranks), all_stages)
    raise typer.Exit(run(request, json))


def rehearse_rank(config_file: ConfigFile, rank: int, out: Path, gpu: Path, overrides: Overrides = None) -> None:
    """Rehearse one rank in this process. `srlm rehearse` starts it."""
    from srlm_mega.tools.rehearsal.rehearse_command import write_rank

    write_rank(config_file, overrides or [], rank, gpu, out)


def rank_numbers(text: str | None) -> tuple[int, ...]:
    """Return the ranks in a list such as 0,16,63. UserError for anything else."""
    words = [] if text is None else text.split(",")
    if not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", word) for word in words):
        raise UserError(f"--ranks {text}: give numbers with commas between them, such as 0,16,63")
    return tuple(map(int, words))
