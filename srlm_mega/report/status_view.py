"""Output of `srlm status`: a table, printed once or updated until the run ends."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from srlm_mega.report.status import RunStatus, StageStatus, read_status, share_done
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.soundness import damages
from srlm_mega.text import duration, on_one_screen

WATCH_SECONDS = 1.0
TABLE_LINES = 6  # its title, head and rules
MIN_STAGES = 3
STYLES = {"done": "green", "damaged": "red", "partial": "yellow", "missing": "dim"}


def watch(folder: Path, console: Console) -> None:
    """Update the table until the run's controller ends; show it once if none is at work."""
    damaged = dict(damages(RunDir(folder)))
    status = read_status(folder, damaged)
    with Live(screen(status, console), console=console, auto_refresh=False) as live:
        while status.works:
            time.sleep(WATCH_SECONDS)
            status = read_status(folder, damaged)
            live.update(screen(status, console), refresh=True)


def screen(status: RunStatus, console: Console) -> Group:
    """Render the view or, on a terminal, what fits there, a line for each: the newest rounds, and the stages around the
    one at work. What is too high would lose its end, which says most."""
    if not console.is_terminal:
        return view(status)
    below, health = [headline_text(status), *loss_texts(status)], health_texts(status)
    room = max(0, console.height - TABLE_LINES - len(below))
    below += health[max(0, len(health) - room // 2) :]
    if status.works:  # how it ended is told whole
        for text in below:
            text.no_wrap, text.overflow = True, "ellipsis"
    most = console.height - TABLE_LINES - len(below)
    return Group(*([stage_table(status, most)] if most >= MIN_STAGES else []), *below)


def view(status: RunStatus) -> Group:
    """Render stages, the time left, the newest losses, and the health of the rounds."""
    return Group(stage_table(status), headline_text(status), *loss_texts(status), *health_texts(status))


def headline_text(status: RunStatus) -> Text:
    """Render how far the run is."""
    return Text(headline(status), style="bold")


def loss_texts(status: RunStatus) -> list[Text]:
    """Render the newest losses of each model."""
    return [Text(f"{one.model} step {one.step}: {figures(one.figures)}") for one in status.losses]


def health_texts(status: RunStatus) -> list[Text]:
    """Render each round's shares, and its figures that are beyond a limit."""
    texts = []
    for one in status.health:
        texts.append(Text(f"{one.round}: {shares(one.shares)}"))
        texts += [Text(f"{one.round}: {figure}", style="yellow") for figure in one.beyond]
    return texts


def stage_table(status: RunStatus, most: int | None = None) -> Table:
    """Render a row per stage of the plan, or a line for each of at most so many around the one at work."""
    one_line = most is not None
    table = Table(title=Text(status.run, no_wrap=one_line, overflow="ellipsis"), box=box.SIMPLE_HEAD)
    for name in ("stage", "state", "rows", "time"):
        table.add_column(name, justify="right" if name in ("rows", "time") else "left", no_wrap=one_line)
    table.add_column("")
    before, shown = around_work(status.stages, len(status.stages) if most is None else most)
    if before:
        table.add_row(f"{before} before")
    for one in shown:
        note = Text(one.note.replace("\n", " ") if one_line else one.note, no_wrap=one_line, overflow="ellipsis")
        table.add_row(one.name, Text(one.state, style=STYLES[one.state]), rows(one), spent(one), note)
    if after := len(status.stages) - before - len(shown):
        table.add_row(f"{after} after")
    return table


def around_work(stages: Sequence[StageStatus], most: int) -> tuple[int, Sequence[StageStatus]]:
    """Return the stages that fit in `most` lines with the one at work in the middle, and the number of those before.
    The number of those before and of those after take a line each."""
    if len(stages) <= most:
        return 0, stages
    states = [one.state for one in stages]
    works = next((states.index(state) for state in ("partial", "damaged", "missing") if state in states), len(stages))
    first = max(0, min(works - (most - 2) // 2, len(stages) - (most - 2)))
    return first, stages[first : first + most - 2]


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
        return f"{done}; not running" + (f": {on_one_screen(status.ended)}" if status.ended else "")
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
