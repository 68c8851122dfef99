"""Engines that die under replicas, as processes: TensorRT-LLM's stand-in with an executor that ends on demand."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from places import ROOT
from sampling_run import CANDIDATES, begin_run

from srlm_mega.chat import Chat
from srlm_mega.records import Candidate, FailedRequest, read_jsonl
from srlm_mega.run.run_dir import RunDir

STAND_IN = ROOT / "tests/support/tensorrt_llm_stand_in"
PROMPTS = [f"list {number % 4 + 2} animals upper please" for number in range(40)]
SAMPLER = ["sampler.backend=trtllm_torch", "sampler.num_devices=2", "sampler.batch_size=8", "sampler.shard_size=2"]


def start(run: RunDir, **failures: str) -> "subprocess.Popen[str]":
    """Sample the candidates by two replicas."""
    path = os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")])
    argv = [str(Path(sys.executable).parent / "srlm"), "stage", str(run.root), CANDIDATES]
    environment = {**os.environ, "PYTHONPATH": path, **failures}
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment)


def sample(run: RunDir, **failures: str) -> tuple[int, str]:
    """The same to its end: the exit code of the stage, and what all of them printed."""
    process = start(run, **failures)
    said, _ = process.communicate()
    return process.returncode, said


def candidates(run: RunDir) -> list[str]:
    return [one.id for one in read_jsonl(run.output(CANDIDATES) / "candidates.jsonl", Candidate)]


ALL = [f"p{number:03d}-c{copy}" for number in range(40) for copy in range(4)]


@pytest.mark.parametrize("version", ["1.2", "1.4"])
def test_a_replica_whose_engine_dies_starts_once_more(tmp_path: Path, version: str) -> None:
    run, once = begin_run(tmp_path / "run", PROMPTS, *SAMPLER), tmp_path / "died"
    code, said = sample(run, STAND_IN_VERSION=version, STAND_IN_DIES_AFTER="10", STAND_IN_FAILS_ONCE=str(once))
    assert code == 0, said[-4000:]
    assert once.exists() and said.count("ended with code 6; its shards are free, it starts again") == 1
    assert candidates(run) == ALL and not (run.output(CANDIDATES) / "failed.jsonl").exists()


def test_when_every_engine_dies_again_the_stage_is_worth_another_attempt(tmp_path: Path) -> None:
    """No request is called failed, and what was answered is kept."""
    run = begin_run(tmp_path / "run", PROMPTS, *SAMPLER)
    code, said = sample(run, STAND_IN_DIES_AFTER="6")
    assert code == 1 and "all 2 replicas ended" in said, said[-4000:]
    assert said.count("it starts again") == 2 and "failed for good" not in said
    finished = run.partial(CANDIDATES) / "candidates.jsonl.shards"
    kept = {path.name: path.stat().st_mtime_ns for path in finished.glob("shard_*.jsonl")}
    assert 2 <= len(kept) < 20
    code, said = sample(run)
    assert code == 0, said[-4000:]
    assert candidates(run) == ALL
    again = [line for line in (run.output(CANDIDATES) / "metrics.jsonl").read_text().splitlines() if '"shard":' in line]
    assert len(again) == 20, "none was done twice"


def test_when_the_stage_is_killed_its_replicas_end_with_requests_in_flight(tmp_path: Path) -> None:
    """Their engines hang; what was committed before is not done again."""
    run = begin_run(tmp_path / "run", PROMPTS, *SAMPLER)
    process = start(run, STAND_IN_HANGS_AFTER="8")
    finished = run.partial(CANDIDATES) / "candidates.jsonl.shards"
    while not list(finished.glob("shard_*.jsonl")):
        assert process.poll() is None
        time.sleep(0.05)
    replicas = [one for one in psutil.Process(process.pid).children(recursive=True) if "replica" in one.cmdline()]
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(replicas, timeout=60)
    assert replicas and not alive
    kept, metrics = len(list(finished.glob("shard_*.jsonl"))), run.partial(CANDIDATES) / "metrics.jsonl"
    before = metrics.read_text().splitlines() if metrics.exists() else []
    code, said = sample(run)
    assert code == 0 and candidates(run) == ALL, said[-4000:]
    lines = (run.output(CANDIDATES) / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(before) + 20 - kept + 1, "a line per shard of this attempt, and one for all"


def test_a_bad_request_costs_itself(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", PROMPTS, *SAMPLER, "sampler.max_failed_share=0.3")
    (three,) = Chat.from_folder(run.weights("M1")).encode("3")
    code, said = sample(run, STAND_IN_REFUSED_TOKEN=str(three))
    assert code == 0, said[-4000:]
    failed = list(read_jsonl(run.output(CANDIDATES) / "failed.jsonl", FailedRequest))
    assert [one.id for one in failed] == [f"p{number:03d}" for number in range(1, 40, 4)]
    assert {one.attempts for one in failed} == {3} and candidates(run) == [
        one for one in ALL if one[:4] not in {two.id for two in failed}
    ]
