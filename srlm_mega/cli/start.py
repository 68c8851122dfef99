"""Where the `srlm` command (launch/srlm) begins: with what Ctrl-C does, before anything that takes time is imported."""

import os
import signal
import sys
from types import FrameType

from srlm_mega.errors import STOP_REQUESTED


def main() -> None:
    """Run the command line. Ctrl-C ends it with exit code 4 and no traceback, where the command does not answer it, and
    nothing where a shell started it in the background, to ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # launch/srlm let it wait
    open_what_is_closed()
    match sys.argv[1:]:
        case ["torchrun", *words]:  # without the command line, whose imports every training would wait for
            from srlm_mega.training.torchrun_agent import main as run_agent

            run_agent(words)
        case _:
            from srlm_mega.cli.main import main as run

            run()


def open_what_is_closed() -> None:
    """Let a standard stream that a shell closed (`<&-`) lead nowhere, before a file of ours gets its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def interrupted(number: int, frame: FrameType | None) -> None:
    """End the process, with what it would clean up."""
    os.write(sys.stderr.fileno(), b"interrupted: Ctrl-C\n")
    sys.exit(STOP_REQUESTED)


if __name__ == "__main__":  # where the package is on PYTHONPATH and not installed
    sys.argv[0] = "srlm"
    main()
