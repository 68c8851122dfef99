"""Output of `srlm status`: a table, printed once or updated until the run ends."""

import time
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from srlm_mega.report.status import RunStatus, StageStatus, read_status, share_done
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.soundness import damages
from srlm_mega.sampling.sampling_rate import duration

WATCH_SECONDS = 1.0
STYLES = {"done": "green", "damaged": "red", "partial": "yellow", "missing": "dim"}


def watch(folder: Path, console: Console) -> None:
    """Update the table until the run's controller ends; show it once if none is at work."""
    damaged = dict(damages(RunDir(folder)))
    status = read_status(folder, damaged)
    with Live(view(status), console=console, auto_refresh=False) as live:
        while status.works:
            time.sleep(WATCH_SECONDS)
            status = read_status(folder, damaged)
            live.update(view(status), refresh=True)


def view(status: RunStatus) -> Group:
    """Render stages, the time left, the newest losses, and the health of the rounds."""
    parts: list[RenderableType] = [stage_table(status), Text(headline(status), style="bold")]
    parts += [Text(f"{one.model} step {one.step}: {figures(one.figures)}") for one in status.losses]
    for one in status.health:
        parts.append(Text(f"{one.round}: {shares(one.shares)}"))
        parts += [Text(f"{one.round}: {figure}", style="yellow") for figure in one.beyond]
    return Group(*parts)


def stage_table(status: RunStatus) -> Table:
    """Render one row per stage of the plan."""
    table = Table("stage", "state", title=Text(status.run), box=box.SIMPLE_HEAD)
    table.add_column("rows", justify="right")
    table.add_column("time", justify="right")
    table.add_column("")
    for one in status.stages:
        table.add_row(one.name, Text(one.state, style=STYLES[one.state]), rows(one), spent(one), Text(one.note))
    return table


def rows(one: StageStatus) -> str:
    """Return the number of records of a finished stage, or the progress of a partial one."""
    if one.state == "partial" and one.total:
        return f"{one.done:,} of {one.total:,} {one.unit}"
    return f"{one.done:,}" if one.done else ""


def spent(one: StageStatus) -> str:
    """Return the time that a finished stage took, or an estimate for another."""
    if one.seconds is None:
        return ""
    return f"{one.seconds:.1f} s" if one.state == "done" else f"~ {duration(one.seconds)}"


def headline(status: RunStatus) -> str:
    """Return 'running: 12 of 17 stages, about 3 min 20 s left', or how the run ended."""
    done = share_done(status.stages)
    if not status.works:
        return f"{done}; not running" + (f": {status.ended}" if status.ended else "")
    left = "time left is known after the first round" if status.seconds_left is None else duration(status.seconds_left)
    return f"running: {done}, {left if status.seconds_left is None else f'about {left} left'}"


def figures(values: Mapping[str, float | None]) -> str:
    """Return 'loss 0.6931, grad norm 1.2'; a value that was not finite is written as NaN or inf."""
    return ", ".join(
        f"{name.removeprefix('rewards/').replace('_', ' ')} {'NaN or inf' if value is None else f'{value:.4g}'}"
        for name, value in values.items()
    )


def shares(values: Mapping[str, float]) -> str:
    """Return 'pairs 95.0 %, ties 5.0 %'."""
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in values.items())
