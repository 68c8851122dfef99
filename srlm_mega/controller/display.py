"""What a person sees while a run goes on: a bar for the stage at work, a line for each finished one."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from srlm_mega.run.progress import ProgressState

STAGE_WIDTH = 22


class StageLine:
    """The bar of the stage at work."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def update(self, state: ProgressState) -> None:
        """Show the newest state."""
        if state.total:
            note = f"{state.done:,} of {state.total:,} {state.unit}  {state.note}"
            self._bars.update(self._task, completed=state.done, total=state.total, note=note)


class Display:
    """Lines on a terminal; without one (a log file, CI) only the line of each finished stage."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str) -> Iterator[StageLine]:
        """The bar of one stage, gone when the block ends."""
        columns = (
            SpinnerColumn(),
            TextColumn(f"{{task.description:<{STAGE_WIDTH}}}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bars:
            yield StageLine(bars, bars.add_task(name, total=None, note="starting"))

    def finished(self, name: str, rows: int, seconds: float) -> None:
        """One line that stays."""
        count = f"{rows:>7,} rows" if rows else " " * 12
        self._console.print(f"[green]✓[/] {name:<{STAGE_WIDTH}} {count} {seconds:8.1f} s", highlight=False)

    def say(self, text: str) -> None:
        """Plain words; nothing in them is markup."""
        self._console.print(text, markup=False, highlight=False)
