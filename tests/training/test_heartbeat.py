"""The watchdog: who did not arrive, by hand and with a process that is stopped."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from torch.distributed import TCPStore

from srlm_mega.training.heartbeat import Beat, absent

NAMES = ["rank 0 (TP 0, PP 0, DP 0)", "rank 1 (TP 1, PP 0, DP 0)", "rank 2 (TP 0, PP 1, DP 0)"]
RANK = """
import os, signal, sys, time
from torch.distributed import TCPStore
from srlm_mega.training.heartbeat import Heartbeat

rank, port = int(sys.argv[1]), int(sys.argv[2])
names = ["rank 0 (TP 0, PP 0, DP 0)", "rank 1 (TP 1, PP 0, DP 0)"]
timeouts = {"start": 60.0, "step": 3.0, "checkpoint": 60.0, "export": 60.0}
store = TCPStore("localhost", port, is_master=False)
store.add("here", 1)
while store.add("here", 0) < int(sys.argv[3]):  # on a busy machine one starts seconds after the other
    time.sleep(0.05)
heartbeat = Heartbeat(store, rank, names, timeouts, lambda message: print("told:", message, flush=True), interval=0.1,
                      patience=3.0)
heartbeat.beat("step", "step 7, data")
print("begun", file=sys.stderr, flush=True)
time.sleep(0.5)
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
heartbeat.beat("step", "step 7, forward and backward")
time.sleep(60)
"""


def beats(*counts: int, ticks: int) -> list[Beat]:
    return [Beat(NAMES[rank], count, f"place {count}", ticks) for rank, count in enumerate(counts)]


def test_who_is_behind_did_not_arrive() -> None:
    said = absent(NAMES, beats(9, 8, 9, ticks=4), beats(9, 8, 9, ticks=7))
    assert said == "Did not arrive: rank 1 (TP 1, PP 0, DP 0), still in place 8"


def test_who_is_silent_did_not_arrive() -> None:
    earlier, later = beats(9, 9, 9, ticks=4), beats(9, 9, 9, ticks=7)
    later[2] = replace(later[2], ticks=4)
    said = absent(NAMES, [None, *earlier[1:]], [None, *later[1:]])
    assert said == (
        "Did not arrive: rank 0 (TP 0, PP 0, DP 0), never heard of; "
        "rank 2 (TP 0, PP 1, DP 0), last heard of in place 9, not answering"
    )


def test_when_all_are_there_nobody_is_blamed() -> None:
    assert "All ranks are at this place" in absent(NAMES, beats(9, 9, 9, ticks=4), beats(9, 9, 9, ticks=7))


@pytest.mark.timing
def test_a_stopped_process_is_named_and_the_others_end() -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(store.port), "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said, stacks = ranks[0].communicate(timeout=240)
    finally:
        os.kill(ranks[1].pid, signal.SIGKILL)
        ranks[1].communicate()
    assert ranks[0].returncode == 1
    line = (
        "step 7, forward and backward takes longer than 0.05 min. Did not arrive: rank 1 (TP 1, PP 0, DP 0), "
        "last heard of in step 7, data, not answering"
    )
    assert said == f"told: {line}\n"
    assert stacks.splitlines()[-1] == line and 'File "<string>", line 21' in stacks


SERVER = """
import time
from torch.distributed import TCPStore
store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(120)
"""


@pytest.mark.timing
def test_a_store_that_does_not_answer_keeps_nobody() -> None:
    """As behind a cable that was cut: the question is never answered, and never refused."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        rank = subprocess.Popen(
            [sys.executable, "-c", RANK, "0", port, "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert rank.stderr is not None
        while "begun" not in (line := rank.stderr.readline()):
            assert line, "it ended before it began"
        server.send_signal(signal.SIGSTOP)
        said, _ = rank.communicate(timeout=110)
    finally:
        server.kill()
        server.communicate()
    assert rank.returncode == 1
    place = said.removeprefix("told: ").partition(" takes longer")[0]
    assert place in ("step 7, data", "step 7, forward and backward")
    assert said.endswith("takes longer than 0.05 min, and the store of the ranks does not answer\n")
