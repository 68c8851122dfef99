"""The `srlm` command. Every command is a few lines: the work is elsewhere, imported where it is needed, so that
`srlm run` starts in a blink."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from srlm_mega.cli_arguments import OVERRIDES, ConfigFile, Overrides, RunFolder, existing_run
from srlm_mega.cli_bench import bench_app
from srlm_mega.cli_convert import convert, engine_app
from srlm_mega.cli_doctor import doctor, preflight
from srlm_mega.cli_evaluate import evaluate_app, export_app
from srlm_mega.cli_launch import launch_app
from srlm_mega.cli_plan import plan
from srlm_mega.errors import (
    CRASHED,
    PREEMPTED,
    STOPPED,
    USER_ERROR,
    RunPreempted,
    RunStopped,
    StageCrashed,
    UserError,
    exit_code,
    reason,
)

app = typer.Typer(
    help="Train self-rewarding language models: one run is one folder, and what is on disk is what is done.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Look at a configuration.", no_args_is_help=True, rich_markup_mode=None)
show_app = typer.Typer(help="Look inside a run.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")
app.add_typer(show_app, name="show")
app.command()(convert)
app.command()(doctor)
app.command(context_settings=OVERRIDES)(plan)
app.add_typer(engine_app, name="engine")
app.add_typer(bench_app, name="bench")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(export_app, name="export")
app.add_typer(launch_app, name="launch")
launch_app.command(context_settings=OVERRIDES)(preflight)

WORDS = {CRASHED: "crashed", USER_ERROR: "error", STOPPED: "stopped", PREEMPTED: "interrupted"}


@app.command(context_settings=OVERRIDES)
def run(
    config_file: ConfigFile,
    overrides: Overrides = None,
    redo: Annotated[list[str] | None, typer.Option(help="Make this stage again, and all that comes from it.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Make no other stage than this; may be repeated.")] = None,
) -> None:
    """Run the whole self-rewarding loop; started again, it goes on where it stopped."""
    from srlm_mega.config.file import load_config
    from srlm_mega.display import Display
    from srlm_mega.loop import run_loop
    from srlm_mega.run_dir import RunDir

    console = Console()
    config = load_config(config_file, overrides or [])
    folder = RunDir(config.run.dir)
    try:
        made = run_loop(config, folder, tuple(redo or ()), Display(console), tuple(only or ()))
    except RunStopped:
        write_report(folder.root)
        raise
    if made or not folder.report_file.is_file():
        write_report(folder.root)
    else:
        console.print(f"Nothing to do: every stage of {folder.root} is finished.", markup=False, highlight=False)
    print_summary(folder.root, console)


@app.command()
def stage(
    run: RunFolder,
    names: Annotated[list[str], typer.Argument(help="For example round_1/candidates.", metavar="NAME...")],
) -> None:
    """Make outputs of a run, in this process. `srlm run` starts these, under torchrun where ranks are needed."""
    from srlm_mega.run_dir import RunDir
    from srlm_mega.stage import run_stages

    existing_run(run)
    raise typer.Exit(run_stages(RunDir(run), names))


@app.command(hidden=True)
def replica(run: RunFolder, name: str, number: int) -> None:
    """One of several processes that sample a stage of a run; `srlm stage` starts them."""
    from srlm_mega.run_dir import RunDir
    from srlm_mega.stages.sharded import work_as_replica

    raise typer.Exit(work_as_replica(RunDir(run), name, number))


@app.command(hidden=True)
def compare_checkpoints(run: RunFolder, name: str, parts: list[str]) -> None:
    """What a training stage that pauses for early stopping waits for; `srlm run` starts it."""
    from srlm_mega.run_dir import RunDir
    from srlm_mega.stages.early_stopping import compare_checkpoints as compare_them

    raise typer.Exit(compare_them(RunDir(run), name, parts))


@app.command()
def status(
    run: RunFolder,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run until it ends.")] = False,
    json: Annotated[bool, typer.Option("--json", help="As JSON, once.")] = False,
) -> None:
    """Stages with rows and seconds, what is left, the newest losses, the rounds' health; reads files only."""
    from srlm_mega.status import read_status
    from srlm_mega.status_view import view
    from srlm_mega.status_view import watch as follow

    existing_run(run)
    if json:
        import orjson

        print(orjson.dumps(read_status(run), option=orjson.OPT_INDENT_2).decode())
    elif watch:
        follow(run, Console())
    else:
        Console().print(view(read_status(run)))


@app.command()
def report(run: RunFolder) -> None:
    """Write summary.json and report.html of a run, finished or not."""
    from srlm_mega.report.page import write_report as write_page
    from srlm_mega.report.summary import write_summary

    existing_run(run)
    write_summary(run)
    print(write_page(run))


@app.command()
def compare(runs: Annotated[list[Path], typer.Argument(help="Run folders, for example one per seed.")]) -> None:
    """The final tables of several runs beside one another, as Markdown."""
    from srlm_mega.tools.compare_runs import comparison

    print(comparison([existing_run(run) for run in runs]))


@show_app.command("pair")
def show_pair(pair_id: Annotated[str, typer.Argument(metavar="ID")], run: RunFolder) -> None:
    """A preference pair with all it came from: prompt, candidates, scores, judge texts, model hash, seeds."""
    from srlm_mega.lineage import pair_text

    print(pair_text(existing_run(run), pair_id))


@show_app.command("seed")
def show_seed(run: RunFolder) -> None:
    """What the seed data came to, step by step: lines read, left out and why, drawn; and the yield of EFT."""
    from srlm_mega.lineage import seed_text

    print(seed_text(existing_run(run)))


@show_app.command("paper")
def show_paper(run: Annotated[Path | None, typer.Argument(help="A run of Llama 2 70B to show beside.")] = None) -> None:
    """The paper's numbers, and beside them those of a run of Llama 2 70B."""
    from srlm_mega.evaluation.paper import as_markdown
    from srlm_mega.evaluation.run_tables import beside

    print(as_markdown())
    if run is not None:
        print(beside(existing_run(run)))


@config_app.command("show", context_settings=OVERRIDES)
def config_show(config_file: ConfigFile, overrides: Overrides = None) -> None:
    """The resolved values, and where each came from."""
    from srlm_mega.config.file import leaves, load_config, origins

    values = leaves(load_config(config_file, overrides or []))
    where = origins(config_file, overrides or [])
    width = max(len(key) for key in values)
    for key, value in values.items():
        print(f"{key:<{width}} = {'null' if value is None else value!s:<32} # {where[key]}")


@config_app.command("schema")
def config_schema() -> None:
    """JSON Schema of the configuration file."""
    import orjson

    from srlm_mega.config import Config

    print(orjson.dumps(Config.model_json_schema(), option=orjson.OPT_INDENT_2).decode())


def write_report(run: Path) -> None:
    """`srlm report` in a process of its own: plots need packages that the controller does without."""
    argv = [str(Path(sys.executable).parent / "srlm"), "report", str(run)]
    subprocess.run(argv, check=False, stdout=subprocess.DEVNULL)


def print_summary(run: Path, console: Console) -> None:
    """The final table, and where the rest is."""
    from srlm_mega.report.summary import build_summary
    from srlm_mega.report.terminal import summary_table

    console.print(summary_table(build_summary(run)))
    console.print(f"Report: {run / 'report.html'}\nA pair's history: srlm show pair ID {run}", highlight=False)


def main() -> None:
    """Entry point: a user's mistake is one message, never a traceback."""
    try:
        app()
    except (UserError, RunStopped, RunPreempted, StageCrashed, OSError) as error:
        code = exit_code(error)
        if code == CRASHED and not isinstance(error, StageCrashed):
            raise
        exit_with(code, f"{WORDS[code]}: {reason(error)}")


def exit_with(code: int, message: str) -> None:
    """Print to stderr and leave."""
    print(message, file=sys.stderr)
    sys.exit(code)
