"""Processes that do not outlive the one that started them."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int) -> None:
    """Ask Linux to kill this process when its parent ends, however it ends; for `preexec_fn`, it survives the exec.

    A parent that is already gone is noticed too.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)
