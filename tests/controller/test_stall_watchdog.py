"""A stage without progress: named, with the stacks of its processes, and ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import TOY
from rich.console import Console

from srlm_mega.config.file import load_config
from srlm_mega.controller import loop
from srlm_mega.controller.background_report import BackgroundReport
from srlm_mega.controller.display import Display
from srlm_mega.controller.stall_watchdog import StallWatchdog, handles_signal, stall_seconds
from srlm_mega.errors import StageCrashed
from srlm_mega.launch.ranks import Start
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import ProgressState
from srlm_mega.run.run_dir import RunDir

CONFIG = load_config(TOY)
CANDIDATES = find_stage(CONFIG, "round_1/candidates")
STUCK = """
import os, subprocess, sys, time
from pathlib import Path
from srlm_mega.launch.child_process import die_with, show_stacks_when_asked

def wait_for_an_answer():
    if len(sys.argv) > 2:
        subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[1]])
    Path(sys.argv[1]).touch()
    time.sleep(120)

die_with(os.getppid())
show_stacks_when_asked()
wait_for_an_answer()
"""


@pytest.mark.timing
def test_a_stage_and_its_replica_show_their_stacks_and_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ready = RunDir(tmp_path), tmp_path / "ready"
    argv = [sys.executable, "-c", STUCK, str(ready), STUCK]
    monkeypatch.setattr(loop, "stage_command", lambda group, config, run: Start(argv))
    lease = run.partial(CANDIDATES.name) / "candidates.jsonl.shards" / "shard_00003.lease"
    lease.parent.mkdir(parents=True)
    lease.write_text("1")
    check = StallWatchdog.check

    def check_when_ready(silence: StallWatchdog, state: ProgressState, pid: int) -> None:
        if ready.exists():
            silence._seconds = 0.6
            check(silence, state, pid)

    monkeypatch.setattr(StallWatchdog, "check", check_when_ready)
    with pytest.raises(StageCrashed) as crashed:
        loop.execute([CANDIDATES], CONFIG, run, Display(Console(quiet=True)), BackgroundReport(run))
    said = str(crashed.value)
    assert said.startswith("round_1/candidates: no progress for 0.01 min. Waited for: replica 1, 0 min in shard_00003")
    assert "The stacks of 2 processes are in" in said and "runtime.progress_timeout_minutes" in said
    log = run.log_file(CANDIDATES.name).read_text()
    assert log.count("in wait_for_an_answer") == 2


def test_progress_begins_the_time_anew(tmp_path: Path) -> None:
    silence = StallWatchdog(CANDIDATES.name, tmp_path, tmp_path / "log", seconds=1000)
    before = silence._since
    silence.check(ProgressState(), os.getpid())
    assert silence._since == before
    silence.check(ProgressState(1, 10, "prompts"), os.getpid())
    assert silence._since > before


@pytest.mark.timing
def test_only_who_listens_is_asked() -> None:
    code = "import time; time.sleep(60)"
    deaf = subprocess.Popen([sys.executable, "-c", code])
    code = (
        "from srlm_mega.launch.child_process import show_stacks_when_asked as show; show(); print(flush=True); " + code
    )
    hears = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert hears.stdout is not None and hears.stderr is not None
        hears.stdout.readline()
        assert handles_signal(hears.pid) and not handles_signal(deaf.pid)
        os.kill(hears.pid, signal.SIGUSR2)
        assert "Current thread" in hears.stderr.readline()
        time.sleep(0.1)
        assert hears.poll() is None, "it goes on"
    finally:
        deaf.kill()
        hears.kill()
        hears.communicate()
        deaf.wait()


def test_how_long_a_stage_may_be_silent() -> None:
    assert stall_seconds(CANDIDATES, CONFIG) == 120 * 60
    trained = find_stage(CONFIG, "M2")
    assert stall_seconds(trained, CONFIG) == 2 * 60 * 60, "twice the longest phase, export"
