"""launch/torchrun_multinode.sh on two hosts, over gloo: a cable cut for a moment, and for longer than a step."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hosts import Host, hosts, skip_without_hosts
from places import ROOT

from srlm_mega.run.run_dir import RunDir
from srlm_mega.training.checkpoint_files import complete_steps

pytestmark = [pytest.mark.extra, pytest.mark.timing]
SRLM = Path(sys.executable).parent / "srlm"
LONG = 300.0  # seconds for what takes 30 on an idle machine
PHASE_MINUTES = 0.4  # longest time of a step or a checkpoint; a step takes a twentieth of a second
SETTINGS = [
    "pretrain=null",
    "model.hidden_size=16",
    "model.ffn_hidden_size=32",
    "seed_data.num_documents=40",
    "seed_data.num_ift=40",
    "seed_data.num_eft=40",
    "seed_data.num_eft_eval=4",
    "seed_data.num_validation=4",
    "sft.train_iters=100000",  # until it is asked to stop
    "sft.packed_sequence_size=null",
    "sft.micro_batch_size=2",
    "sft.global_batch_size=2",
    "trainer.save_interval=20",
    f"trainer.step_timeout_minutes={PHASE_MINUTES}",
    f"trainer.checkpoint_timeout_minutes={PHASE_MINUTES}",  # the cable may be cut in one
    "launch.nodes=2",
    "launch.processes_per_node=1",
]


@pytest.fixture
def pair() -> Iterator[list[Host]]:
    """Two hosts."""
    skip_without_hosts()
    with hosts(["left", "right"]) as made:
        yield made


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that `srlm run` took as far as one node can, and the lines it then printed."""
    made = RunDir(tmp_path / "run")
    argv = [SRLM, "run", ROOT / "launch/configs/toy_cpu.yaml", *SETTINGS, f"run.dir={made.root}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stdout + done.stderr
    made.root.joinpath("lines").write_text(done.stderr)
    return made


@contextmanager
def started(pair: list[Host], run: RunDir, attempt: int, option: str = "") -> "Iterator[list[subprocess.Popen[bytes]]]":
    """Each host's line, as it was printed, with one option more."""
    lines = [line for line in (run.root / "lines").read_text().splitlines() if "torchrun_multinode.sh" in line]
    assert len(lines) == 2
    processes = []
    try:
        for host, line in zip(pair, lines, strict=True):
            with log_of(run, host, attempt).open("wb") as log:
                line = line.replace("FIRST_NODE", "left").replace(" --nnodes", f" {option} --nnodes")
                argv = host.command(["bash", "-c", f"exec {line}"])
                processes.append(
                    subprocess.Popen(argv, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def log_of(run: RunDir, host: Host, attempt: int) -> Path:
    return run.root / f"{host.name}.{attempt}.log"


def said(run: RunDir) -> str:
    """What both hosts printed."""
    return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(run.root.glob("*.log")))


def newest(run: RunDir) -> int:
    return max(complete_steps(run.partial("M1") / "megatron"), default=0)


def wait_beyond(run: RunDir, step: int) -> None:
    """Until a later step than this one is saved."""
    deadline = time.monotonic() + LONG
    while newest(run) <= step:
        assert time.monotonic() < deadline, said(run)
        time.sleep(0.05)


def test_a_cut_cable(pair: list[Host], run: RunDir) -> None:
    """For a moment: training waits and goes on. For good: both hosts end, and say who is missing. The same lines once
    more, this time by c10d, go on from the checkpoint."""
    left, right = pair
    with started(pair, run, attempt=0) as processes:
        wait_beyond(run, 0)
        right.link("down")
        time.sleep(3)  # of the 24 s that a step may take
        right.link("up")
        wait_beyond(run, newest(run))
        assert [process.poll() for process in processes] == [None, None], said(run)
        right.link("down")
        codes = [process.wait(LONG) for process in processes]
    assert all(codes), said(run)
    end = log_of(run, left, 0).read_text()
    assert "takes longer than 0.4 min" in end and "Did not arrive: rank 1" in end, said(run)
    other = log_of(run, right, 0).read_text()
    assert "takes longer than 0.4 min, and the store of the ranks does not answer" in other, said(run)
    right.link("up")
    before = newest(run)
    with started(pair, run, attempt=1, option="--rendezvous=c10d") as processes:
        wait_beyond(run, before)
        run.stop_file.touch()
        assert [bool(process.wait(LONG)) for process in processes] == [True, True]
    texts = [log_of(run, host, 1).read_text() for host in pair]  # c10d decides where the first rank is
    assert sum(f"resuming from {run.partial('M1')}/megatron/iter_{before:07d}" in text for text in texts) == 1, said(
        run
    )
    assert all("The same command resumes from there" in text for text in texts), said(run)
