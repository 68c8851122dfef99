"""Several processes on one stage: whoever samples, dies or is slow, the records are the same."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import orjson
import psutil
import pytest
from places import ROOT, TOY
from sampling_run import CANDIDATES, JUDGEMENTS, begin_run, finish_stage, start_stage, with_files

from srlm_mega.checkpoints_conversion.convert import Record
from srlm_mega.config.file import load_config
from srlm_mega.records import PromptTokens
from srlm_mega.run.progress import read_progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.finished_shard import FinishedShard, ShardReport
from srlm_mega.sampling.job_files import SampledModel
from srlm_mega.sampling.replicas import Replicas, ready_file, ready_replicas
from srlm_mega.sampling.shards import ShardFiles, cut_one_call

pytestmark = pytest.mark.timing
STAND_IN = ROOT / "tests/support/tensorrt_llm_stand_in"

PROMPTS = [f"list {number % 7 + 1} animals upper please" for number in range(200)]
SMALL = ["sampler.shard_size=8", "candidates.max_new_tokens=64"]  # seconds of work, to be killed in the middle of it
TWO = [*SMALL, "sampler.num_devices=2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The candidates of an uninterrupted stage in one process."""
    run = begin_run(tmp_path_factory.mktemp("whole") / "run", PROMPTS, *SMALL)
    records = finish_stage(run, CANDIDATES)
    assert records.count(b"\n") == 800
    return records


def shard_reports(run: RunDir) -> list[ShardReport]:
    """Of the shards that are finished so far."""
    folder = run.partial(CANDIDATES) / "candidates.jsonl.shards"
    reports = []
    for path in folder.glob("shard_*.jsonl"):
        with contextlib.suppress(FileNotFoundError):  # merged in between
            reports.append(FinishedShard.load(path).report)
    return reports


def first_to_finish(run: RunDir, count: int = 1) -> int:
    """The replica that finishes a shard first: on a busy machine it can be either, and long before the other. Waits
    for `count` shards of all."""
    deadline = time.monotonic() + 300
    while len(reports := shard_reports(run)) < count:
        assert time.monotonic() < deadline, run.log_file(CANDIDATES).read_text()
        time.sleep(0.01)
    return reports[0].replica


def started_replicas(stage: int) -> list[psutil.Process]:
    """Replicas 0 and 1, as soon as both processes are there: seconds of imports before their first shard."""
    deadline = time.monotonic() + 300
    found: dict[str, psutil.Process] = {}
    while found.keys() != {"0", "1"}:
        assert time.monotonic() < deadline, f"replicas {sorted(found)} of 2 have started"
        for child in psutil.Process(stage).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "replica" in child.cmdline():
                    found[child.cmdline()[-1]] = child
        time.sleep(0.01)
    return [found["0"], found["1"]]


def metrics(run: RunDir) -> list[dict[str, float]]:
    return [orjson.loads(line) for line in (run.output(CANDIDATES) / "metrics.jsonl").read_bytes().splitlines()]


@pytest.mark.extra
def test_the_shards_of_a_killed_replica_are_taken_over(tmp_path: Path, whole: bytes) -> None:
    """The other one sleeps until then: on a busy machine either may do all shards before the other has started."""
    run = begin_run(tmp_path / "run", PROMPTS, *TWO)
    process = start_stage(run, CANDIDATES)
    killed, other = started_replicas(process.pid)
    other.send_signal(signal.SIGSTOP)
    assert first_to_finish(run, 2) == 0  # of the second one perhaps only the report is there
    killed.send_signal(signal.SIGKILL)
    other.send_signal(signal.SIGCONT)
    assert process.wait(timeout=300) == 0, run.log_file(CANDIDATES).read_text()
    assert (run.output(CANDIDATES) / "candidates.jsonl").read_bytes() == whole
    assert "replica 0 ended with code -9" in run.log_file(CANDIDATES).read_text()
    lines = metrics(run)
    assert {line["replica"] for line in lines[:-1]} == {0, 1} and lines[-1]["requests"] == 200
    assert sorted(path.name for path in run.output(CANDIDATES).iterdir()) == [
        "candidates.jsonl", "manifest.json", "metrics.jsonl"
    ]  # fmt: skip


@pytest.mark.extra
def test_without_any_replica_the_stage_crashes_and_can_go_on(tmp_path: Path, whole: bytes) -> None:
    """Each is started once more before the stage gives up."""
    run = begin_run(tmp_path / "run", PROMPTS, *TWO)
    process = start_stage(run, CANDIDATES)
    first_to_finish(run)
    for attempt in range(2):
        killed = started_replicas(process.pid)
        for child in killed:
            child.send_signal(signal.SIGKILL)
        psutil.wait_procs(killed)
        assert len(shard_reports(run)) < 25, f"attempt {attempt} was killed too late to prove anything"
    assert process.wait(timeout=300) == 1
    said = run.log_file(CANDIDATES).read_text()
    assert said.count("its shards are free, it starts again") == 2 and "all 2 replicas ended" in said
    assert finish_stage(run, CANDIDATES) == whole


def test_replicas_that_have_loaded_are_counted(tmp_path: Path) -> None:
    for number in (0, 11):
        ready_file(tmp_path, number).touch()
        (tmp_path / f"replica_{number}.progress.json").touch()
    assert ready_replicas(tmp_path) == 2


def test_replicas_of_a_node_start_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four on two nodes; one that dies while it loads starts again after the one that waited for it."""
    slurm = ["sampler.slurm=true", "sampler.num_devices=4", "sampler.devices_per_node=2"]
    config = load_config(TOY, [f"run.dir={tmp_path / 'run'}", *slurm])
    files = ShardFiles(cut_one_call([PromptTokens("p", (3,))], 1, 0), tmp_path / "answers", 0)
    files.prepare()
    replicas = Replicas(config, SampledModel(tmp_path, tmp_path), tmp_path / "replicas")
    started: list[int] = []

    def start(self: Replicas, number: int) -> SimpleNamespace:
        started.append(number)
        return SimpleNamespace(
            poll=lambda: codes.get(number), returncode=-9, terminate=int, wait=lambda timeout: 0, args=[]
        )

    codes: dict[int, int] = {}
    monkeypatch.setattr(Replicas, "_started", start)
    again = set[int]()
    replicas._tend(files, again)
    replicas._tend(files, again)
    assert started == [0, 2], "one on each node, until it has loaded"
    ready_file(tmp_path / "replicas", 2).touch()
    replicas._tend(files, again)
    assert started == [0, 2, 3]
    codes[0] = -9
    replicas._tend(files, again)
    assert started == [0, 2, 3, 1] and again == {0}
    codes.clear()
    ready_file(tmp_path / "replicas", 1).touch()
    replicas._tend(files, again)
    assert started == [0, 2, 3, 1, 0]
    replicas.close()


def test_ctrl_c_of_a_terminal_does_not_reach_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that starts them answers it, in one line."""
    monkeypatch.setattr("srlm_mega.sampling.replicas.sampler_process", lambda *given: ["sleep", "600"])
    replicas = Replicas(load_config(TOY), SampledModel(tmp_path, tmp_path), tmp_path / "replicas")
    replicas._alive[0] = replica = replicas._started(0)
    assert os.getpgid(replica.pid) == replica.pid != os.getpgid(0)
    replicas.close()
    assert replica.returncode == -signal.SIGTERM


@pytest.mark.extra
def test_one_load_serves_all_stages_of_a_model(tmp_path: Path) -> None:
    """Candidates and their judgements: two replicas each load M1 once, and nothing of theirs is left."""
    run = begin_run(tmp_path / "run", PROMPTS[:24], "sampler.num_devices=2", "candidates.max_new_tokens=8")
    argv = [str(Path(sys.executable).parent / "srlm"), "stage", str(run.root), CANDIDATES, JUDGEMENTS]
    said = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    assert said.returncode == 0, said.stderr
    loads = said.stderr.count("Loading weights: 100%")
    assert 1 <= loads <= 2, "the first may be done before the second has loaded"
    assert run.manifest(CANDIDATES) is not None and run.manifest(JUDGEMENTS) is not None
    assert not run.replicas.exists()


def test_a_replicas_mistake_is_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")]))
    run = begin_run(tmp_path / "run", PROMPTS[:8], *TWO, "sampler.backend=trtllm_engine")
    config = load_config(run.config_file)
    with_files(run, config, "M1/sampler_weights", unproven)
    assert start_stage(run, CANDIDATES).wait(timeout=300) == 2
    said = read_progress(run.progress_file(CANDIDATES))
    assert said.exit_code == 2 and "was converted and not verified" in said.message
    assert "--redo M1/sampler_weights" in said.message


def unproven(out: Path) -> None:
    """A conversion without its proof."""
    (out / "checkpoint").mkdir()
    record = Record("trtllm", "bfloat16", 1, 1, "source", "huggingface", 0, False, {})
    (out / "checkpoint" / "conversion.json").write_text(json.dumps(asdict(record)))
