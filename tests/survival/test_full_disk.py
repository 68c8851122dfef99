"""Runs on a file system that is full, or has no inodes left, until it is made larger."""

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from interruptions import MARK, Interruption, Way, orphans
from small_runs import SRLM, TURN, WINDOWS, Trial, arguments, without

pytestmark = pytest.mark.extra
TURNS = {"test_a_full_disk_ends_with_a_message": (16, 17)}
# A file system of its own for the run, too small and then large enough. It goes with the shell: the run is copied out.
SCRIPT = """\
cd "$1" && mkdir small && mount -t tmpfs -o "$2" tmpfs small || exit 77
cp -a run small/ && cd small || exit 78
shift 2
"$@" >../said 2>&1
echo $? >../code
mount -o remount,size=1g,nr_inodes=100k "$PWD" || exit 79
"$@" >../said_again 2>&1
echo $? >../code_again
cp -a run ../finished
"""


def in_a_namespace(*argv: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A command that sees file systems that it mounts itself."""
    own = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    return subprocess.run(
        [*own, *argv],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where nothing can be mounted."""
    folder = tmp_path_factory.mktemp("mount")
    tried = in_a_namespace("mount", "-t", "tmpfs", "tmpfs", str(folder))
    if tried.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {tried.stderr.strip()}")


def test_a_full_disk_ends_with_a_message(
    undisturbed: Path, prompts: Path, mounts: None, tmp_path: Path, judged: Callable[..., None], rng: random.Random,
    number: int,
) -> None:  # fmt: skip
    window, what = rng.choice(WINDOWS), "size" if number % TURN == 16 else "nr_inodes"
    trial = Trial(tmp_path / "trial", arguments(prompts))
    without(undisturbed, window, trial.folder)
    before, after = (used(folder, what) for folder in (trial.run, undisturbed))
    limit = rng.randint(before, after)
    argv = ["sh", "-c", SCRIPT, "sh", str(trial.folder), f"{what}={limit}", SRLM, *trial.arguments]
    one_thread = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", MARK: str(trial.folder)}
    done = in_a_namespace(*argv, **one_thread)
    assert done.returncode == 0, done.stderr
    trial.left_alive += orphans(str(trial.folder))
    names = ("code", "said", "code_again", "said_again")
    code, said, code_again, said_again = ((trial.folder / name).read_text(errors="replace") for name in names)
    trial.outputs += [f"{what}={limit} of {after}, {window}: code {code}{said}", f"code {code_again}{said_again}"]
    assert int(code) in (0, 2, 3) and said.strip() and int(code_again) == 0, trial.outputs
    trial.interruptions += [Interruption(Way.FULL_DISK, 1)] if int(code) else []
    trial.run.rename(trial.folder / "begun")
    (trial.folder / "finished").rename(trial.run)
    judged("a full file system", trial, undisturbed)


def used(run: Path, what: str) -> int:
    """What a run takes of a tmpfs: bytes in pages, or inodes."""
    files = [path for path in run.rglob("*") if not path.is_dir()]
    pages = sum(-(-path.stat().st_size // 4096) for path in files)
    return (pages + 4) * 4096 if what == "size" else len(list(run.rglob("*"))) + 4
