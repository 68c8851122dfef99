"""Processes that end with the one that started them."""

import ctypes
import multiprocessing
import os
import signal
from threading import Thread


def end_with_parent() -> None:
    """End this process of multiprocessing when its parent does, which a thread waits for."""
    Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def die_with(parent_pid: int) -> None:
    """Let Linux kill this process when its parent ends (PR_SET_PDEATHSIG, SIGKILL); for `preexec_fn`."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)
