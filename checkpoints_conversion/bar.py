"""What a person sees of a conversion: done, total, GB/s."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from srlm_mega.checkpoints_conversion.build import Report


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Report]:
    """A bar on the terminal, on stderr; nothing where there is none."""
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
    """For those who do not watch."""
    yield lambda written: None
