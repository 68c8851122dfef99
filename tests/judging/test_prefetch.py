"""Iterators in a process of their own: the same items, the same errors, and nothing left behind."""

import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from srlm_mega.errors import UserError
from srlm_mega.judging.prefetch import BATCH, prefetch
from srlm_mega.judging.rewards import read_rewards, rewards_in
from srlm_mega.records import JudgementScore, write_jsonl


def squares(count: int, fail_at: int | None = None) -> Iterator[tuple[int, int]]:
    for number in range(count):
        if number == fail_at:
            raise ValueError(f"no square of {number}")
        yield number * number, os.getpid()


def killed_at(count: int) -> Iterator[int]:
    yield from range(count)
    os.kill(os.getpid(), signal.SIGKILL)


def endless() -> Iterator[int]:
    while True:
        yield 1


def blocked(folder: Path | None = None) -> Iterator[bool]:
    """Whether Ctrl-C reaches this process; with a folder it first tells its pid there, and works for long."""
    if folder is not None:
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(60)
    yield signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("count", [0, 1, BATCH, 2 * BATCH + 3])
def test_every_item_in_order_by_another_process(count: int) -> None:
    found = list(prefetch(squares, count))
    assert [square for square, _ in found] == [number * number for number in range(count)]
    assert os.getpid() not in {process for _, process in found}


def test_what_is_raised_there_is_raised_here_after_what_came_before() -> None:
    items = prefetch(squares, 3 * BATCH, fail_at=2 * BATCH)
    assert [next(items)[0] for _ in range(2 * BATCH)] == [number * number for number in range(2 * BATCH)]
    with pytest.raises(ValueError, match=f"no square of {2 * BATCH}"):
        next(items)


def test_a_killed_process_is_an_error_and_no_early_end() -> None:
    with pytest.raises(RuntimeError, match="was killed"):
        list(prefetch(killed_at, 2 * BATCH))


def test_who_stops_reading_leaves_no_process() -> None:
    items = prefetch(endless)
    assert next(items) == 1
    assert len(multiprocessing.active_children()) == 1
    items.close()  # type: ignore[attr-defined]  # a generator
    assert multiprocessing.active_children() == []


def write_judgements(folder: Path) -> Path:
    rng = random.Random(0)
    scores = [None, 0.0, 2.0, 3.5, 5.0]
    names = [(f"c{number}", turn) for number in range(3 * BATCH) for turn in range(rng.randint(1, 4))]
    path = folder / "judgements.jsonl"
    write_jsonl(path, (JudgementScore(f"{name}-j{turn}", name, rng.choice(scores)) for name, turn in names))
    return path


@pytest.mark.parametrize("min_valid", [1, 3])
def test_rewards_by_another_process_are_the_same(tmp_path: Path, min_valid: int) -> None:
    path = write_judgements(tmp_path)
    here = list(rewards_in(path, min_valid))
    assert len(here) == 3 * BATCH and {len(one.scores) for one in here} == {1, 2, 3, 4}
    assert list(read_rewards(path, min_valid, worth_a_process=0)) == here == list(read_rewards(path, min_valid))


def test_a_bad_line_is_named_from_there_too(tmp_path: Path) -> None:
    path = write_judgements(tmp_path)
    count = len(path.read_bytes().splitlines())
    with path.open("ab") as file:
        file.write(b'{"id": "half\n')
    with pytest.raises(UserError, match=rf"judgements\.jsonl:{count + 1}: JudgementScore: Invalid JSON"):
        list(read_rewards(path, 1, worth_a_process=0))


def test_ctrl_c_is_for_the_reader_alone() -> None:
    assert list(prefetch(blocked)) == [True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


READER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from srlm_mega.judging.prefetch import prefetch
from test_prefetch import blocked
if __name__ == "__main__":
    list(prefetch(blocked, Path(sys.argv[2])))
"""


def test_a_killed_reader_leaves_no_process(tmp_path: Path) -> None:
    """Also while the other one has nothing to send, and does not see that nobody reads."""
    os.mkfifo(tmp_path / "pid")
    (tmp_path / "reader.py").write_text(READER)
    argv = [sys.executable, str(tmp_path / "reader.py"), str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(argv) as reader:
        maker = os.pidfd_open(int((tmp_path / "pid").read_text()))
        reader.kill()
    poll = select.poll()
    poll.register(maker)
    assert poll.poll(30_000), "it ends long before its work does"
