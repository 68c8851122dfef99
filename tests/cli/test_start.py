"""Ctrl-C at any moment ends a command with code 4 and no traceback."""

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from srlm_mega.errors import STOP_REQUESTED

# Sends the signal when a module is imported, or when the command works.
AT = """
import os, signal, sys
from importlib.abc import MetaPathFinder

wanted = sys.argv.pop(1)

class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == wanted:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from srlm_mega.cli.start import main
main()
"""


def begun(at_start: signal.Handlers, module: str, *words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """A command, started by a shell that set what SIGINT does, and interrupted when it imports the module."""
    return subprocess.run(
        [sys.executable, "-c", AT, module, *words], capture_output=True, text=True, cwd=cwd,
        preexec_fn=partial(signal.signal, signal.SIGINT, at_start),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("srlm_mega.cli.main", ["report", "RUN"]),
        ("typer", ["doctor"]),
        ("srlm_mega.checkpoints_conversion.convert", ["convert", "a", "b", "--to", "huggingface"]),
        ("srlm_mega.stages.head_to_head", ["evaluate", "head-to-head", "a", "b", "--out", "c"]),
        ("srlm_mega.launch.doctor", ["doctor", "--for", "cpu"]),
        ("srlm_mega.config.file", ["run", "toy_cpu"]),
    ],
)
def test_in_the_middle_of_a_command(module: str, words: list[str], tmp_path: Path) -> None:
    done = begun(signal.SIG_DFL, module, *words, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (STOP_REQUESTED, "interrupted: Ctrl-C"), done.stderr


def test_a_command_in_the_background_of_a_script_stays(tmp_path: Path) -> None:
    """A shell lets it ignore Ctrl-C, which is for what runs in the foreground."""
    done = begun(signal.SIG_IGN, "typer", "show", "paper", cwd=tmp_path)
    assert done.returncode == 0 and "interrupted" not in done.stderr
