"""The work of a conversion, divided over processes that end with the one that started them."""

import multiprocessing
import queue
import signal
from collections.abc import Sequence
from multiprocessing.queues import Queue

from srlm_mega.checkpoints_conversion.build import MatrixWriter, Report, Task
from srlm_mega.checkpoints_conversion.parent_end import end_with_parent

POLL_SECONDS = 0.5
REPORT_BYTES = 64 * 1024**2  # a message for every block would cost more than writing it
Message = int | str  # bytes written, or why it failed


def run(work: MatrixWriter, tasks: Sequence[tuple[int, Task]], jobs: int, report: Report) -> None:
    """Fill the matrices of all tasks. ValueError, with the message of the process that found it, when a tensor is
    wrong; RuntimeError when a process ends otherwise."""
    if jobs == 1 or len(tasks) < 2:
        work.fill(tasks, report)
        return
    context = multiprocessing.get_context("spawn")
    messages: Queue[Message] = context.Queue()
    # Dealt out from the largest to the smallest, so that all processes end at about the same time.
    largest_first = sorted(tasks, key=lambda task: -sum(stored.nbytes for stored in task[1]))
    workers = [
        context.Process(target=_work, args=(work, largest_first[number::jobs], messages), daemon=True)
        for number in range(min(jobs, len(tasks)))
    ]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # this process answers Ctrl-C for all
    for worker in workers:
        worker.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        while any(worker.is_alive() for worker in workers) or not messages.empty():
            try:
                message = messages.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(message, str):  # one failure ends all: `finally` kills the others
                raise ValueError(message)
            report(message)
        for worker in workers:
            worker.join()
            if worker.exitcode:
                raise RuntimeError(f"a conversion process ended with code {worker.exitcode}: the same command resumes")
    finally:
        for worker in workers:
            worker.kill()


def _work(work: MatrixWriter, tasks: Sequence[tuple[int, Task]], messages: "Queue[Message]") -> None:
    end_with_parent()
    unreported = 0

    def report(written: int) -> None:
        nonlocal unreported
        unreported += written
        if unreported < REPORT_BYTES:
            return
        messages.put(unreported)
        unreported = 0

    try:
        work.fill(tasks, report)
        messages.put(unreported)
    except ValueError as error:
        messages.put(str(error))
