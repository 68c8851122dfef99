"""Runs in which the n-th write, rename or fsync of the run's files fails, in whichever process it falls."""

import errno
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from interruptions import Interruption, Way
from small_runs import WINDOWS, Trial, arguments, without

pytestmark = pytest.mark.extra
TURNS = {"test_a_write_that_fails_ends_with_a_message": range(11, 16)}
SHORT = 0  # no error: a write writes half of what it was given
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, SHORT)
CALLS = {window[0]: calls for window, calls in zip(WINDOWS, (100, 800, 300, 500), strict=True)}  # of each, about
CODES = {0, 2, 3}  # 0: what failed was not needed, such as a progress file of no stage
MESSAGE = re.compile(r"^(error|stopped): \S", re.MULTILINE)


@pytest.fixture(scope="session")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled layer between our processes and the C library."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here (apt-get install gcc libc6-dev)")
    source, built = Path(__file__).with_name("failing_writes.c"), tmp_path_factory.mktemp("layer") / "failing_writes.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-O1", "-o", built, source, "-ldl"], check=True)
    return built


def failing(layer: Path, counter: Path, folder: Path, call: int, error: int, forever: bool) -> dict[str, str]:
    """The environment in which the call of this number below the folder fails, and all after it with `forever`."""
    counter.write_bytes(bytes(2 * struct.calcsize("L")))
    variables = {
        "LD_PRELOAD": str(layer),
        "FAILING_COUNTER": str(counter),
        "FAILING_FOLDER": str(folder),
        "FAILING_CALL": str(call),
        "FAILING_ERRNO": str(error),
    }
    return variables | ({"FAILING_FOREVER": "1"} if forever else {})


def counted(counter: Path) -> tuple[int, int]:
    """How many calls there were, and how many of them failed."""
    calls, failed = struct.unpack("2L", counter.read_bytes())
    return calls, failed


def test_a_write_that_fails_ends_with_a_message(
    undisturbed: Path, prompts: Path, layer: Path, tmp_path: Path, judged: Callable[..., None], rng: random.Random,
    number: int,
) -> None:  # fmt: skip
    """And a short write, which is no error, changes nothing."""
    window, error, forever = rng.choice(WINDOWS), rng.choice(ERRORS), rng.random() < 0.5
    trial, counter = Trial(tmp_path / "trial", arguments(prompts)), tmp_path / "counter"
    without(undisturbed, window, trial.folder)
    call = rng.randint(1, CALLS[window[0]])
    code = trial.end(trial.start(**failing(layer, counter, trial.run.resolve(), call, error, forever)))
    _, failed = counted(counter)
    said = f"{window}, call {call}, {errno.errorcode.get(error, 'short')}, forever={forever}: {trial.outputs[-1]}"
    assert code in ((0,) if error == SHORT else CODES), said
    assert code == 0 or MESSAGE.search(trial.outputs[-1]), said
    if failed:
        trial.interruptions.append(Interruption(Way.FAILED_CALL, 1))
    trial.finish()
    judged("a write, rename or fsync fails", trial, undisturbed)
