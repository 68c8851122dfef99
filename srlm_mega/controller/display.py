"""The terminal during a run: a bar for the stage at work, a line for each finished one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from srlm_mega.run.progress import ProgressState

STAGE_WIDTH = 22


class Display:
    """Lines on a terminal; without one (a log file, CI) only the line of each finished stage."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[ProgressState], None]]:
        """Show the bar of one stage until the block ends; the block calls what it is given with each new state."""
        columns = (
            SpinnerColumn(),
            TextColumn(f"{{task.description:<{STAGE_WIDTH}}}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bars:
            task = bars.add_task(name, total=None, note="starting")

            def show(state: ProgressState) -> None:
                if state.total:
                    note = f"{state.done:,} of {state.total:,} {state.unit}  {state.note}"
                    bars.update(task, completed=state.done, total=state.total, note=note)

            yield show

    def finished(self, name: str, rows: int, seconds: float) -> None:
        """Print the line of a finished stage."""
        count = f"{rows:>7,} rows" if rows else " " * 12
        line = f" {name:<{STAGE_WIDTH}} {count} {seconds:8.1f} s"
        self._console.print(Text.assemble(("✓", "green"), line), highlight=False)

    def print_line(self, text: str) -> None:
        """Print a text as it is; nothing in it is markup."""
        self._console.print(text, markup=False, highlight=False)
