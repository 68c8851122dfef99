"""What commands print: text of models, users and files reaches a terminal with its control characters spelled out."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from errno import EPIPE
from io import TextIOBase, TextIOWrapper
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from srlm_mega.errors import CRASHED
from srlm_mega.text import on_one_screen, visible


class VisibleOutput(TextIOBase):
    """Standard output for what is printed. A VisibleConsole, whose colours and bars are control characters, passes it
    by."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed takes it for a field
        """Encoding of the stream below."""
        return self.stream.encoding

    def write(self, text: str) -> int:
        """Write a text, visible."""
        with self._named():
            return self.stream.write(visible(text))

    def flush(self) -> None:
        """Hand on what is buffered."""
        with self._named():
            self.stream.flush()

    def isatty(self) -> bool:
        """Tell whether it is a terminal."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor below."""
        return self.stream.fileno()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Give an error of the block a name. Where nobody reads any more, as behind `| head`, the command just ends."""
        try:
            yield
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # Python writes the rest when it exits
            if error.errno == EPIPE:
                sys.exit(CRASHED)
            raise OSError(error.errno, error.strerror, "standard output") from None


class VisibleConsole(Console):
    """A console of Rich in whose texts control characters are spelled out, and nothing is markup."""

    def __init__(self, width: int | None = None) -> None:
        out = sys.stdout.stream if isinstance(sys.stdout, VisibleOutput) else sys.stdout
        super().__init__(file=out, width=width, markup=False, emoji=False, highlight=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


@contextmanager
def visible_output() -> Iterator[None]:
    """Let what the block prints be visible, and written when it ends. OSError, by this name, where it cannot be."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal's encoding may lack what we print
    with redirect_stdout(VisibleOutput(sys.stdout)) as output:
        try:
            yield
        finally:
            output.flush()


def print_message(text: str) -> None:
    """Print an error or a warning to stderr: visible, and no longer than a screen."""
    print(on_one_screen(text), file=sys.stderr, flush=True)
