"""Early stopping in whole runs, as users start them: stopped by a judge, run to the end. tests/survival/ kills them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest
from early_stopping_run import early_stopping, prefers, small_run
from fake_endpoint import Asked, Reply, fake_endpoint
from judge_model import write_always_a
from places import ROOT

from srlm_mega.evaluation.checkpoint_choice import EarlyStoppingFiles
from srlm_mega.run.run_dir import RunDir

pytestmark = [pytest.mark.extra, pytest.mark.timing]
KEY = "sk-a-very-secret-key-0123456789"


@dataclass(frozen=True)
class World:
    """A run folder, and how to start it."""

    folder: Path
    prompts: Path

    def start(self, *settings: str) -> subprocess.Popen[str]:
        """`srlm run` with early stopping by these settings."""
        argv = [str(Path(sys.executable).parent / "srlm"), *small_run(self.folder, self.prompts, *settings)]
        pipe, environment = subprocess.PIPE, os.environ | {"JUDGE_KEY": KEY}
        return subprocess.Popen(argv, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)

    def finish(self, *settings: str) -> str:
        """The same to its end; what it printed."""
        process = self.start(*settings)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        return output

    @property
    def counts(self) -> dict[str, float]:
        """Of M2's manifest."""
        manifest = RunDir(self.folder).manifest("M2")
        assert manifest is not None
        return dict(manifest.counts)

    @property
    def weights(self) -> bytes:
        """M2's."""
        return (self.folder / "M2/huggingface/model.safetensors").read_bytes()


def endpoint(url: str) -> list[str]:
    """An endpoint as the judge."""
    return early_stopping("judge.model=j", f"judge.endpoint={url}", "judge.api_key_variable=JUDGE_KEY")


def older_from(step: int, stage_folder: Path) -> Callable[[Asked], Reply]:
    """A judge that prefers the newer checkpoint, and from this step on the older one."""

    def reply(asked: Asked) -> Reply:
        waiting = EarlyStoppingFiles(stage_folder).waiting()
        return prefers("newer" if (waiting or 0) < step else "older", stage_folder, asked)

    return reply


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An uninterrupted run whose judge finds step 4 worse than step 2."""
    folder = tmp_path_factory.mktemp("stopped")
    world = World(folder / "run", folder / "prompts.jsonl")
    with fake_endpoint(older_from(4, world.folder / "M2.partial")) as fake:
        world.finish(*endpoint(fake.url))
    return world


ONLY_M2 = ("--only", "M2")  # the others are there, and nothing is asked of its evaluation


def copied(world: World, folder: Path) -> World:
    """The run without its M2."""
    shutil.copytree(world.folder, folder / "run", ignore=shutil.ignore_patterns("M2", "logs"))
    return World(folder / "run", world.prompts)


def test_the_newer_is_worse_so_it_stops_and_keeps_the_older(stopped: World) -> None:
    assert stopped.counts["kept_step"] == 2 and stopped.counts["steps"] == 4 and stopped.counts["max_steps"] == 6
    assert stopped.counts["score_of_step_4"] < 0.5 <= stopped.counts["score_of_step_2"]
    kept = orjson.loads((stopped.folder / "M2/early_stopping/step_0000004/verdict.json").read_bytes())
    assert kept["kept"] == 2 and "step 2 is kept; training stops" in kept["reason"]
    assert not list((stopped.folder / "M2").rglob("iter_*")) and not list(
        (stopped.folder / "M2/early_stopping").rglob("*.safetensors")
    )
    steps = [orjson.loads(line) for line in (stopped.folder / "M2/metrics.jsonl").read_bytes().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[0]["learning_rate"] == pytest.approx(1e-2) and steps[3]["learning_rate"] > 8e-6, "the schedule is of 6"
    assert [p for p in stopped.folder.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()] == []


def test_pauses_change_nothing_in_what_is_learnt(stopped: World, tmp_path: Path) -> None:
    """Two pauses, and no comparison lost: the model is the one of a training without early stopping."""
    world = copied(stopped, tmp_path)
    with fake_endpoint(older_from(99, world.folder / "M2.partial")) as fake:
        world.finish(*endpoint(fake.url), *ONLY_M2)
    assert world.counts["kept_step"] == 6 and world.counts["comparisons"] == 3
    paused, earlier = world.weights, stopped.weights
    world.finish("--redo", "M2", *ONLY_M2)
    assert world.weights == paused != earlier


def test_a_local_judge_that_sees_no_difference(stopped: World, tmp_path: Path) -> None:
    """It says A in either order, so every comparison is a tie; where more is asked of a checkpoint, M1 is kept."""
    world = copied(stopped, tmp_path)
    write_always_a(tmp_path / "judge")
    asked_for = ("judge.max_new_tokens=8", "stop_below=0.6")
    world.finish(*early_stopping(f"judge.model={tmp_path / 'judge'}", *asked_for), *ONLY_M2)
    assert world.counts["kept_step"] == 0 and world.counts["score_of_step_2"] == 0.5 and world.counts["steps"] == 2
    assert world.weights == (world.folder / "M1/huggingface/model.safetensors").read_bytes()


def test_an_endpoint_that_is_down_loses_nothing(stopped: World, tmp_path: Path) -> None:
    """With two ranks, which pause and end together."""
    world, ranks = copied(stopped, tmp_path), ["parallel.pipeline_model_parallel_size=2", "launch.processes_per_node=2"]
    process = world.start(*endpoint("http://127.0.0.1:9/v1"), *ranks, "early_stopping.judge.attempts=1", *ONLY_M2)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 3 and "cannot be reached" in output and "Traceback" not in output, output
    exported = world.folder / "M2.partial/early_stopping/step_0000002/exported.json"
    written = exported.stat().st_mtime_ns
    with fake_endpoint(older_from(2, world.folder / "M2.partial")) as fake:
        world.finish(*endpoint(fake.url), *ranks, *ONLY_M2)
    assert (world.folder / "M2/early_stopping/step_0000002/exported.json").stat().st_mtime_ns == written
    assert world.counts["kept_step"] == 0, "step 2 was worse than M1"
