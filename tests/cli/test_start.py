"""Ctrl-C at any moment ends a command with code 4 and no traceback."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from places import ROOT

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


# In a fork for each command, so that only one process imports: the signal comes when a command begins to work.
EVERY = """
import json, os, signal, sys
from importlib.abc import MetaPathFinder
from pathlib import Path
import typer
from srlm_mega.cli.main import app
from srlm_mega.cli.start import main

VALUES = {"config_file": "toy_cpu", "run": "RUN", "runs": "RUN", "rank": "0", "number": "0", "words": "a b --to trtllm"}

class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith("srlm_mega."):
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

def commands(command, words=()):
    if isinstance(command, typer.core.TyperGroup):
        return [leaf for name, one in command.commands.items() for leaf in commands(one, (*words, name))]
    for needed in (one for one in command.params if one.required):
        option = [] if needed.param_type_name == "argument" else [f"--{needed.name}"]
        words = (*words, *option, *VALUES.get(needed.name, "x").split())
    return [words]

ended = {}
for words in commands(typer.main.get_command(app)):
    child = os.fork()
    if child == 0:
        file = os.open("said", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = ["srlm", *words]
        sys.meta_path.insert(0, Finder())
        main()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ended[" ".join(words)] = [code, Path("said").read_text()]
print(json.dumps(ended))
"""


def test_every_command_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "config.yaml").touch()
    done = subprocess.run(
        [sys.executable, "-c", EVERY], capture_output=True, text=True, cwd=tmp_path,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    assert len(ended) > 30 and "stage RUN x" in ended and "show pair x RUN" in ended
    assert ended.pop("config schema")[0] == 0, "it imports nothing more"
    assert {words: end for words, end in ended.items() if end != [STOP_REQUESTED, "interrupted: Ctrl-C\n"]} == {}


def command_beside(python: str, folder: Path) -> Path:
    """launch/srlm, installed beside a Python."""
    command = folder / "srlm"
    shutil.copy(ROOT / "launch/srlm", command)
    (folder / "python3").write_text(f"#!/bin/sh\n{python}\n")
    (folder / "python3").chmod(0o755)
    return command


def test_ctrl_c_waits_until_python_has_started(tmp_path: Path) -> None:
    """Python's own answer, while it starts, is a traceback. The signal is there before its first instruction."""
    if subprocess.run(["env", "--block-signal=INT", "true"], capture_output=True).returncode:
        pytest.skip("this env cannot let a signal wait")
    command = command_beside(f'kill -INT $$\nexec "{sys.executable}" "$@"', tmp_path)
    done = subprocess.run([command, "show", "paper"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (STOP_REQUESTED, "", "interrupted: Ctrl-C\n")


def test_spawned_processes_do_not_run_the_command_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """multiprocessing reads the main script once more in each of them."""
    monkeypatch.setattr(sys, "argv", ["srlm", "show", "paper"])
    assert "main" in runpy.run_path(str(ROOT / "launch/srlm"), run_name="__mp_main__")


def test_the_command_takes_the_python_beside_it(tmp_path: Path) -> None:
    """Through a link too, with an env that cannot let signals wait, and words as they are."""
    command = command_beside('printf "%s|" "$@"', tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "python3").write_text("#!/bin/sh\necho another\n")  # as in ~/.local/bin
    (tmp_path / "elsewhere" / "python3").chmod(0o755)
    link = tmp_path / "elsewhere" / "srlm"
    link.symlink_to(command)
    (tmp_path / "elsewhere" / "env").write_text("#!/bin/sh\nexit 125\n")
    (tmp_path / "elsewhere" / "env").chmod(0o755)
    path = f"{tmp_path / 'elsewhere'}:{os.environ['PATH']}"
    for start, variables in ((command, os.environ), (link, os.environ), (link, {**os.environ, "PATH": path})):
        done = subprocess.run([start, "a b", "$c", "'d"], capture_output=True, text=True, env=variables)
        assert done.stdout == f"{start}|a b|$c|'d|", done.stderr
