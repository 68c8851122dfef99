"""A round's candidates and judgements by vLLM itself, on CPUs: two replicas in their own environment, one killed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from places import ROOT
from sampling_run import CANDIDATES, JUDGEMENTS, begin_run
from vllm_environment import environment_with_vllm

from srlm_mega.records import Candidate, Judgement, read_jsonl
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.finished_shard import FinishedShard

pytestmark = [pytest.mark.extra, pytest.mark.timing]
PROMPTS = [f"list {number % 4 + 2} animals upper please" for number in range(60)]


def start(run: RunDir) -> "subprocess.Popen[bytes]":
    """Both stages in one process, as `srlm run` starts them; what it prints lies in the log of the first."""
    argv = [str(Path(sys.executable).parent / "srlm"), "stage", str(run.root), CANDIDATES, JUDGEMENTS]
    run.log_file(CANDIDATES).parent.mkdir(exist_ok=True)
    with run.log_file(CANDIDATES).open("ab") as log:
        return subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)


def wait_for_shards(run: RunDir, process: "subprocess.Popen[bytes]", count: int) -> set[int]:
    """The replicas that finished the first shards of the candidates."""
    folder = run.partial(CANDIDATES) / "candidates.jsonl.shards"
    while len(reports := list(folder.glob("shard_*.jsonl"))) < count:
        assert process.poll() is None, run.log_file(CANDIDATES).read_text()[-4000:]
        time.sleep(0.02)
    return {FinishedShard.load(path).report.replica for path in reports if path.exists()}


def test_one_of_two_replicas_is_killed_and_the_set_of_records_is_whole(tmp_path: Path) -> None:
    python = environment_with_vllm(tmp_path)
    sampler = ["sampler.backend=vllm", f"sampler.python={python}", "sampler.device=cpu", "sampler.num_devices=2"]
    heads = ["model.num_attention_heads=2", "model.num_query_groups=1"]  # of 32, which vLLM's kernels for CPUs have
    sizes = ["sampler.shard_size=4", "sampler.batch_size=8", "candidates.max_new_tokens=48", "judge.max_new_tokens=8"]
    run = begin_run(tmp_path / "run", PROMPTS, *sampler, *heads, *sizes)
    process = start(run)
    (killed,) = {min(wait_for_shards(run, process, 1))}
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.cmdline()[-3:-2] == ["replica"] and child.cmdline()[-1] == str(killed):
            child.send_signal(signal.SIGKILL)
    assert process.wait() == 0, run.log_file(CANDIDATES).read_text()[-4000:]
    said = run.log_file(CANDIDATES).read_text()
    assert f"replica {killed} ended with code -9; its shards are free, it starts again" in said
    candidates = list(read_jsonl(run.output(CANDIDATES) / "candidates.jsonl", Candidate))
    assert [one.id for one in candidates] == [f"p{number:03d}-c{copy}" for number in range(60) for copy in range(4)]
    judgements = list(read_jsonl(run.output(JUDGEMENTS) / "judgements.jsonl", Judgement))
    assert [one.candidate_id for one in judgements] == [one.id for one in candidates for _ in range(3)]
    assert all(one.cumulative_logprob is not None and one.cumulative_logprob < 0 for one in candidates)
