"""The `srlm` command. Every command is a few lines: the work is elsewhere, imported where it is needed, so that
`srlm run` starts at once."""

import sys

import typer

from srlm_mega.cli.arguments import OVERRIDES
from srlm_mega.cli.bench import bench_app
from srlm_mega.cli.config import config_app
from srlm_mega.cli.convert import convert, engine_app
from srlm_mega.cli.doctor import doctor, preflight
from srlm_mega.cli.evaluate import evaluate_app, export_app
from srlm_mega.cli.launch import launch_app
from srlm_mega.cli.output import print_message, visible_output
from srlm_mega.cli.planner import plan
from srlm_mega.cli.rehearse import rehearse, rehearse_rank
from srlm_mega.cli.run import compare_checkpoints, replica, run, stage
from srlm_mega.cli.show import compare, report, show_app, status
from srlm_mega.errors import (
    CANNOT_CONTINUE,
    CRASHED,
    STOP_REQUESTED,
    USER_ERROR,
    CannotContinue,
    StageCrashed,
    StopRequested,
    UserError,
    exit_code,
    reason,
)
from srlm_mega.text import on_one_screen

# Wrong words on a command line. Typer exports one kind of them only, and has moved the others.
USAGE_ERROR: type[typer.BadParameter] = typer.BadParameter.__mro__[1]
LABELS = {CRASHED: "crashed", USER_ERROR: "error", CANNOT_CONTINUE: "stopped", STOP_REQUESTED: "interrupted"}

app = typer.Typer(
    help="Train self-rewarding language models. One run is one folder, and the same command resumes it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(context_settings=OVERRIDES)(run)
app.command()(status)
app.add_typer(show_app, name="show")
app.command()(report)
app.command()(compare)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(export_app, name="export")
app.command()(convert)
app.add_typer(engine_app, name="engine")
app.command(context_settings=OVERRIDES)(plan)
app.command(context_settings=OVERRIDES)(rehearse)
app.add_typer(launch_app, name="launch")
launch_app.command(context_settings=OVERRIDES)(preflight)
app.command()(doctor)
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
app.command()(stage)
app.command(hidden=True)(replica)
app.command(hidden=True)(compare_checkpoints)
app.command(hidden=True, context_settings=OVERRIDES)(rehearse_rank)


@app.callback()
def every_command(context: typer.Context) -> None:
    """Let what any command prints be visible."""
    context.with_resource(visible_output())


def main() -> None:
    """Run the command line. A user's mistake is one message of at most a screen, never a traceback."""
    try:
        code = app(standalone_mode=False)
    except USAGE_ERROR as error:
        is_help = error.ctx is not None and error.message == error.ctx.get_help()  # what a command without words shows
        error.message = error.message if is_help else on_one_screen(error.message)
        error.show()
        code = USER_ERROR
    except typer.Abort:  # Ctrl-D at a question
        print_message("Aborted!")
        code = CRASHED
    except (UserError, CannotContinue, StopRequested, StageCrashed, OSError) as error:
        code = exit_code(error)
        if code == CRASHED and not isinstance(error, StageCrashed):
            raise
        print_message(f"{LABELS[code]}: {reason(error)}")
    sys.exit(code)
