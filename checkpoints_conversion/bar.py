"""The progress bar of a conversion: bytes done, bytes in total, bytes per second."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from srlm_mega.checkpoints_conversion.build import Report


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Report]:
    """Show a bar on the terminal (stderr), and nothing where there is no terminal. Yields what adds to it, in bytes."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=total)
        yield lambda written: bars.advance(task, written)


@contextmanager
def no_bar(what: str, total: int) -> Iterator[Report]:
    """Take reports like `progress_bar`, and show nothing."""
    yield lambda written: None
