"""`srlm status`: states, times by hand, and a view that ends when the run ends."""

import io
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import orjson
import pytest
from fake_run import FakeRun, make_run
from rich.console import Console
from typer.testing import CliRunner

from srlm_mega.cli.main import app
from srlm_mega.config.file import load_config
from srlm_mega.report import status_view
from srlm_mega.report.status import Losses, RoundShares, RunStatus, StageStatus, read_status
from srlm_mega.run.files import write_atomic
from srlm_mega.run.plan import find_stage
from srlm_mega.run.presence import Controller, announced, controller_file, read_controller
from srlm_mega.run.progress import ProgressState
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import DPO, EVALUATION, PAIRS, PRETRAINED_BASE, SEED, SFT


def stage(run: Path, name: str) -> StageStatus:
    return next(one for one in read_status(run, {}).stages if one.name == name)


@pytest.fixture
def half(tmp_path: Path) -> FakeRun:
    """Round 1 is finished; in round 2 there are prompts, and M3 is being trained though it should not be yet."""
    run = FakeRun(tmp_path / "toy")
    for name in ("seed", "M0"):
        run.commit(name, {"x.jsonl": []}, 2.0)
    run.model(1)
    run.round(1)
    run.commit("round_1/health", {"x.jsonl": []}, 0.25)
    run.commit("round_1/reference", {"reference.jsonl": []}, 1.5)
    run.model(2)
    run.commit("round_2/prompts", {"prompts.jsonl": []}, 1.25)
    return run


def say(run: RunDir, name: str, done: int, total: int) -> None:
    run.partial(name).mkdir(parents=True)
    run.log_file(name).parent.mkdir(exist_ok=True)
    state = ProgressState(done, total, "prompts", "some words")
    run.progress_file(name).write_bytes(orjson.dumps(asdict(state)))


def test_what_is_left_is_told_from_the_round_before(half: FakeRun) -> None:
    """Round 1: candidates 3.5 s, judgements 9, pairs 0.1, health 0.25, reference 1.5; M2 21.5 s, its evaluation 4."""
    say(half.folder, "round_2/candidates", 3, 10)
    status = read_status(half.folder.root, {})
    assert stage(half.folder.root, "round_1/judgements").seconds == 9.0
    candidates = stage(half.folder.root, "round_2/candidates")
    assert (candidates.state, candidates.done, candidates.total, candidates.note) == ("partial", 3, 10, "some words")
    assert candidates.seconds == pytest.approx(0.7 * 3.5)
    assert stage(half.folder.root, "M3").state == "missing" and stage(half.folder.root, "M3").seconds == 21.5
    assert status.seconds_left == pytest.approx(0.7 * 3.5 + 9 + 0.1 + 0.25 + 1.5 + 21.5 + 4)
    assert [one.model for one in status.losses] == ["M1", "M2"] and status.losses[1].step == 60
    assert status.health[0].beyond == () and status.health[0].shares == pytest.approx(
        {"pairs": 20 / 30, "ties": 7 / 30, "unparsed": 4 / 240, "truncated": 3 / 120}
    )


def test_figures_beyond_their_limits_are_named(half: FakeRun) -> None:
    limits = {"warn": 0.2, "stop": 0.4}
    figures = {
        "tie_rate": {"value": 0.25, **limits, "state": "warn"},
        "truncation": {"value": 0.1, **limits, "state": "fine"},
        "duplicates": {"value": 0.5, **limits, "state": "stop"},
    }
    path = half.folder.output("round_1/health") / "health.json"
    path.write_bytes(orjson.dumps({"round": 1, "state": "stop", "figures": figures}))
    assert read_status(half.folder.root, {}).health[0].beyond == ("stop: duplicates 0.5", "warn: tie_rate 0.25")


def test_nothing_is_guessed_before_a_round_is_known(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "toy")
    assert read_status(run.folder.root, {}).seconds_left is None
    names = ("seed", "M0", "M1", "M2", "M3", "M1/evaluation", "round_2/pairs")
    assert [find_stage(load_config(run.folder.config_file), name).kind for name in names] == [
        SEED, PRETRAINED_BASE, SFT, DPO, DPO, EVALUATION, PAIRS
    ]  # fmt: skip


def test_training_is_timed_by_its_newest_steps(half: FakeRun) -> None:
    """Steps 41 to 60 took 0.1 s each more than the one before: the median is 5.05 s, 40 are left."""
    say(half.folder, "M3", 60, 100)
    lines = [orjson.dumps({"step": step, "loss": 0.5, "step_seconds": 0.1 * step}) for step in range(1, 61)]
    (half.folder.partial("M3") / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'\n{"step": 61, "lo')
    training = stage(half.folder.root, "M3")
    assert training.seconds == pytest.approx(40 * 5.05) and training.note == "some words, 3 min 22 s left"
    assert read_status(half.folder.root, {}).losses[-1].model == "M3"


def test_the_controller_says_how_it_ended(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_controller(run) is None
    with announced(run):
        found = read_controller(run)
        assert found is not None and found.works and found.pid == os.getpid()
    ended = read_controller(run)
    assert ended is not None and not ended.works and ended.ended == "finished"
    with pytest.raises(ValueError, match="bad"), announced(run):
        raise ValueError("bad luck")
    assert read_controller(run) == Controller(os.getpid(), found.host, "bad luck")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert not Controller(dead.pid, found.host).works and Controller(dead.pid, "another machine").works


def test_watching_ends_when_the_run_ends(half: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, file = half.folder, io.StringIO()
    path = controller_file(run)
    path.parent.mkdir(exist_ok=True)
    here = os.uname().nodename
    write_atomic(path, orjson.dumps(asdict(Controller(os.getpid(), here))))
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        """What happens in the meantime: a stage is finished, then the run is stopped."""
        slept.append(seconds)
        if len(slept) == 1:
            half.commit("round_2/candidates", {"candidates.jsonl": []}, 4.0)
        else:
            write_atomic(path, orjson.dumps(asdict(Controller(os.getpid(), here, "no scores"))))

    monkeypatch.setattr(status_view.time, "sleep", sleep)
    status_view.watch(run.root, Console(file=file, width=100))
    assert len(slept) == 2 and "14 of 20 stages; not running: no scores" in file.getvalue()


@pytest.mark.parametrize("size", [(80, 24), (80, 12), (40, 24), (200, 60)])
@pytest.mark.parametrize("finished", [0, 40, 101, 102])
def test_a_terminal_shows_what_matters_of_a_long_run(size: tuple[int, int], finished: int) -> None:
    """Twelve rounds: their 102 stages are four times as many as a terminal of 24 lines has."""
    note = "some words\nand many more " * 9
    stages = [StageStatus(f"round_{number}/x", "missing", 0, 0, "", "", 100.0) for number in range(102)]
    stages[:finished] = [StageStatus(one.name, "done", 9000, 9000, "", "", 12.5) for one in stages[:finished]]
    if finished < 102:
        stages[finished] = StageStatus("round_9/at_work", "partial", 33, 100, "requests", note, 200.0)
    losses = tuple(Losses(model, 60, {"loss": 0.6931, "grad_norm": 1.0}) for model in ("M8", "M9"))
    health = tuple(RoundShares(f"round_{number}", {"pairs": 0.9}, ("warn: tie_rate 0.25",)) for number in range(1, 13))
    status = RunStatus("runs/" + "long/" * 40, True, "", tuple(stages), 1234.0, losses, health)
    file = io.StringIO()
    console = Console(file=file, width=size[0], height=size[1], force_terminal=True, color_system=None)
    console.print(status_view.screen(status, console))
    shown = file.getvalue()
    assert shown.count("\n") < size[1] and max(map(len, shown.splitlines())) <= size[0]
    assert f"running: {finished} of 102 stages" in shown
    assert "M8 step 60: loss 0.6931" in shown and "M9 step 60" in shown
    assert "round_12: warn: tie_rate 0.25" in shown
    if finished < 102 and size[0] >= 80 and size[1] >= 24:
        assert "partial" in shown and "33 of 100" in shown


def test_a_run_that_ended_says_whole_why() -> None:
    status = RunStatus("runs/toy", False, "no scores " * 30, (), None, (), ())
    file = io.StringIO()
    console = Console(file=file, width=80, height=24, force_terminal=True, color_system=None)
    console.print(status_view.screen(status, console))
    assert " ".join(file.getvalue().split()).endswith("no scores " * 29 + "no scores")


def test_the_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "toy", rounds=1)
    shown = CliRunner().invoke(app, ["status", str(run)]).output
    assert "round_1/judgements" in shown and "loss" in shown and "pairs 66.7 %" in shown
    assert CliRunner().invoke(app, ["status", str(run), "--watch"]).output.count("not running") == 1
    found = orjson.loads(CliRunner().invoke(app, ["status", str(run), "--json"]).output)
    assert found["works"] is False and len(found["stages"]) == 12 and found["stages"][0]["state"] == "missing"
