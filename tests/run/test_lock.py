"""One controller, or one stage that a person started, works in a run folder; the others are told who it is."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from places import TOY

from srlm_mega.errors import USER_ERROR, UserError
from srlm_mega.run.lock import TOKEN, held, holder_in
from srlm_mega.run.run_dir import LOCK, RunDir

HOLDER = """
import subprocess, sys
from pathlib import Path
from srlm_mega.run.run_dir import RunDir
CHILD = "import sys; from pathlib import Path; from srlm_mega.run.run_dir import RunDir\\n" \
        "with RunDir(Path(sys.argv[1])).lock(or_by_starter=True): print('let in')"
with RunDir(Path(sys.argv[1])).lock():
    print(subprocess.run([sys.executable, "-c", CHILD, sys.argv[1]], capture_output=True, text=True).stdout, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(run: RunDir) -> "Iterator[subprocess.Popen[str]]":
    """A process that holds the lock, and lets a child of its own in."""
    argv = [sys.executable, "-c", HOLDER, str(run.root)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "let in\n"
            yield process
        finally:
            process.kill()


def test_who_holds_the_lock_is_said_and_only_its_own_processes_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, srlm: Path
) -> None:
    run = RunDir(tmp_path / "run")
    with holder(run) as process:
        run.config_file.write_bytes(TOY.read_bytes())
        who = rf"\(`srlm .*`, process {process.pid} on {socket.gethostname()}, since 2"
        for or_by_starter in (False, True):
            with pytest.raises(UserError, match=who), run.lock(or_by_starter):
                pass
        argv = [str(srlm), "stage", str(run.root), "seed"]
        done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, TOKEN: "1"})
        assert (done.returncode, done.stdout) == (USER_ERROR, "")
        assert f"process {process.pid} on" in done.stderr and done.stderr.count("\n") == 1
        assert not run.progress_file("seed").exists(), "it is the holder's"
        known = holder_in(run.root / LOCK)
        assert known is not None
        monkeypatch.setenv(TOKEN, known.token)
        with run.lock(or_by_starter=True):
            pass
    # The variable is left in a shell, and its owner was killed: whoever comes holds the lock alone.
    with run.lock(or_by_starter=True):
        monkeypatch.setenv(TOKEN, "another")
        with pytest.raises(UserError, match=rf"process {os.getpid()} on "), run.lock(or_by_starter=True):
            pass
    path = run.root / LOCK  # of a holder on another node, whose lock does not show here
    path.write_text(json.dumps({**asdict(known), "host": "another"}))
    monkeypatch.setenv(TOKEN, known.token)
    with run.lock(or_by_starter=True):
        assert holder_in(path) is not None and os.environ[TOKEN] == known.token, "it is still the holder's"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}', "\x00\xff"])
def test_a_lock_file_that_says_nothing(content: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / LOCK).write_text(content)
    with run.lock():
        assert holder_in(tmp_path / LOCK) is not None and os.environ[TOKEN]
        (tmp_path / LOCK).write_text(content)
        with pytest.raises(UserError, match=rf"works in {tmp_path}: wait for it"), run.lock(or_by_starter=True):
            pass
    assert TOKEN not in os.environ and (tmp_path / LOCK).read_bytes() == b""


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError) as failed, held(tmp_path / LOCK, or_by_starter=False):
        pass
    assert failed.value.filename == str(tmp_path / LOCK)
