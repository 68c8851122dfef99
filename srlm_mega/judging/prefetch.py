"""Prefetching: an iterator that runs in a process of its own, ahead of its reader."""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

from srlm_mega.checkpoints_conversion.parent_end import end_with_parent

P = ParamSpec("P")
T = TypeVar("T")
BATCH = 2048  # items a message


def prefetch(make: Callable[P, Iterable[T]], *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
    """Yield and raise what `make(...)` does, in another process that runs ahead of this one. `make`, its arguments and
    the items are pickled: small tuples are cheap, records cost more than most work on them. Raise RuntimeError when
    the process is killed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    maker = context.Process(target=_send, args=(theirs, make, args, kwargs), daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the reader answers Ctrl-C
    maker.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()  # the other process keeps the only writing end, so that its death ends the pipe
    try:
        batch: list[T]
        while batch := _receive(ours):
            yield from batch
    finally:
        maker.kill()
        maker.join()
        ours.close()


def _receive(connection: Connection) -> list[T]:
    try:
        message: list[T] | Exception = connection.recv()
    except EOFError:
        raise RuntimeError("the prefetching process was killed (out of memory?): run the same command again") from None
    if isinstance(message, Exception):
        raise message
    return message


def _send(
    connection: Connection, make: Callable[..., Iterable[T]], args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    end_with_parent()
    try:
        items = iter(make(*args, **kwargs))
        while batch := list(islice(items, BATCH)):
            connection.send(batch)
        connection.send([])
    except BrokenPipeError:
        pass  # the reader has stopped
    except Exception as error:  # raised again by the reader
        connection.send(error)
