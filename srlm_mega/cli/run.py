"""`srlm run`, and the commands that it starts: `srlm stage`, `srlm replica`, `srlm compare-checkpoints`."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from srlm_mega.cli.arguments import ConfigFile, Overrides, RunFolder
from srlm_mega.cli.output import VisibleConsole
from srlm_mega.errors import CannotContinue
from srlm_mega.launch.child_process import adapt_to_node, die_with, srlm_command
from srlm_mega.text import quoted


def run(
    config_file: ConfigFile,
    overrides: Overrides = None,
    redo: Annotated[
        list[str] | None, typer.Option(help="Stage to make again, with all that depends on it; may be repeated.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Stage to make, and no other; may be repeated.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what --redo removes without asking.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be done, and change nothing.")
    ] = False,
) -> None:
    """Run the self-rewarding loop, or resume it. What is finished on disk is kept."""
    from srlm_mega.config.file import load_config
    from srlm_mega.controller.display import Display
    from srlm_mega.controller.loop import run_loop
    from srlm_mega.run.run_dir import RunDir

    console = VisibleConsole()
    config = load_config(config_file, overrides or [])
    folder = RunDir(config.run.dir)
    asks = not yes and sys.stdin.isatty() and sys.stdout.isatty()
    try:
        made = run_loop(
            config, folder, tuple(redo or ()), Display(console), tuple(only or ()), agrees if asks else None, dry_run
        )
    except CannotContinue:
        write_report(folder.root)
        raise
    if dry_run:
        return
    if not made:
        console.print(f"Nothing to do: every stage of {folder.root} is finished.")
    report = write_report(folder.root) if made or not folder.report_file.is_file() else f"Report: {folder.report_file}"
    print_summary(folder.root, report, console)


def agrees(question: str) -> bool:
    """Ask a person on the terminal, who agrees by `y` or `yes` alone."""
    try:
        return input(f"{question} [y/N] ").strip().casefold() in ("y", "yes")
    except EOFError:
        return False


def stage(
    run: RunFolder,
    names: Annotated[
        list[str], typer.Argument(help="Stages to make, for example round_1/candidates.", metavar="NAME...")
    ],
) -> None:
    """Make single stages of a run, in this process. `srlm run` starts it, under torchrun where ranks are needed."""
    adapt_to_node(os.environ)
    from srlm_mega.run.run_dir import RunDir
    from srlm_mega.stages.run_stages import run_stages

    raise typer.Exit(run_stages(RunDir(run), names))


def replica(folder: Path, number: int) -> None:
    """Load a model and sample it, as one of several processes, job after job. `srlm stage` starts them."""
    adapt_to_node(os.environ)
    from srlm_mega.sampling.replica_process import work_as_replica

    raise typer.Exit(work_as_replica(folder, number))


def compare_checkpoints(run: RunFolder, name: str) -> None:
    """Compare the newest checkpoint of a training that pauses for early stopping. `srlm run` starts it."""
    from srlm_mega.run.run_dir import RunDir
    from srlm_mega.stages.early_stopping import compare_checkpoints as compare_them

    raise typer.Exit(compare_them(RunDir(run), name))


def write_report(run: Path) -> str:
    """Run `srlm report` in a process of its own: plots need packages that the controller does without. Return where the
    report is, or that it could not be written; the process says why."""
    argv = [*srlm_command(), "report", os.path.join(os.curdir, run)]  # a name that begins with - is no option
    die = partial(die_with, os.getpid())
    done = subprocess.run(argv, check=False, stdout=subprocess.DEVNULL, start_new_session=True, preexec_fn=die)
    if done.returncode:
        return f"The report could not be written. Try again: srlm report {quoted(run)}"
    return f"Report: {run / 'report.html'}"


def print_summary(run: Path, report: str, console: VisibleConsole) -> None:
    """Print the final table, and where the rest is."""
    from srlm_mega.report.summary import build_summary
    from srlm_mega.report.terminal import summary_table

    console.print(summary_table(build_summary(run)))
    console.print(f"{report}\nA pair's history: srlm show pair ID {quoted(run)}")
