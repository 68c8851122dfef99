"""A damaged log ends nothing: what cannot be read in it is left out."""

import os
from pathlib import Path

import orjson
import pytest
from fake_run import FakeRun
from typer.testing import CliRunner

from srlm_mega.cli.main import app
from srlm_mega.report import status_view
from srlm_mega.report.costs import sampling_rates, training_rates
from srlm_mega.report.page import render
from srlm_mega.report.round_parts import read_dpo_steps
from srlm_mega.report.status import newest_losses, step_seconds
from srlm_mega.run.manifest import begun_with
from srlm_mega.run.presence import controller_file, read_controller
from srlm_mega.run.progress import ProgressState, read_progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.shards import held_shards
from srlm_mega.training.tracker import tracking_id

BAD = {
    "cut": b'{"step": 2, "loss": 0.',
    "not JSON": b"Traceback (most recent call last):",
    "not UTF-8": b'{"step": 2, "note": "\xff\xfe", "loss": "\xc3\x28"}',
    "null": b"null",
    "a list": b"[1, 2, 3]",
    "a number": b"7",
    "a text": b'"abc"',
    "empty": b"",
    "an object without keys": b"{}",
    "other types": b'{"step": "x", "loss": [1], "step_seconds": {}, "shards": true, "rewards/margins": "y", "pid": [], '
    b'"host": 1, "done": "x", "total": [1], "memory/x": "z", "exit_code": "a", "message": 3}',
    "NaN": b'{"step": NaN, "loss": NaN, "done": NaN, "pid": NaN}',
    "infinite": b'{"step": 1e999, "loss": -1e999, "done": 1e999, "pid": 1e999}',
    "huge": b'{"step": 1e308, "loss": 1e308, "step_seconds": 1e308, "rewards/margins": -1e308, "done": 1e308, '
    b'"total": 1e308, "pid": 1e308, "shards": 1, "requests/s": 1e308, "memory/x": 1e308, "unit": "", "note": ""}',
    "5,000 digits": b'{"step": %s, "done": %s, "pid": %s}' % ((b"9" * 5000,) * 3),
    "negative": b'{"step": -5, "done": -1, "total": -7, "pid": -9, "step_seconds": -1e30}',
    "nulls": b'{"step": null, "loss": null, "step_seconds": null, "rewards/margins": null, "done": null, "pid": null}',
    "deep": b"[" * 5000,
    "NUL": b"\0" * 4096,
    "a long line": b'{"step": 1, "x": "' + b"x" * 50_000 + b'"}',
    "controls": b'{"done": 1, "total": 2, "unit": "\\u001b[31m", "note": "[/x]\\u202e", "ended": "\\u001b]8;;\\u0007"}',
    "a surrogate": b'{"done": 1, "total": 2, "unit": "\\ud800", "pid": 1, "host": "\\udfff"}',
}
FIRST = {"step": 1, "loss": 0.5, "step_seconds": 2.0, "rewards/margins": 0.25, "memory/x": 1.5}
LAST = FIRST | {"step": 3, "step_seconds": 4.0}
every_damage = pytest.mark.parametrize("damage", BAD)


@pytest.mark.parametrize("end", [b"", b"\n"])
@every_damage
def test_a_bad_line_among_metrics_is_left_out(damage: str, end: bytes, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    path = run.output("M2") / "metrics.jsonl"
    path.parent.mkdir()
    whole = orjson.dumps({"shards": 4, "requests/s": 2.0})
    path.write_bytes(b"\n".join([orjson.dumps(FIRST), whole, BAD[damage], orjson.dumps(LAST), b""]) + BAD[damage] + end)
    losses = newest_losses(run, "M2")
    assert losses is not None and losses.step in (1, 3, -5)
    assert training_rates(path)["step_seconds"] <= 4.0 and training_rates(path)["memory_GiB"] == 1.5
    assert sampling_rates(path).get("requests/s", 2.0) == 2.0
    steps = read_dpo_steps(path)
    assert {1, 3} <= {step.step for step in steps} and all(isinstance(step.step, int) for step in steps)
    seconds = step_seconds(path)
    assert seconds is not None and seconds <= 4.0


@every_damage
def test_damaged_states_are_none(damage: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for path in (run.progress_file("M2"), controller_file(run), run.partial("M2") / "identity.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(BAD[damage])
    state = read_progress(run.progress_file("M2"))
    assert state == ProgressState() or damage in ("controls", "an object without keys", "a long line", "a surrogate")
    controller = read_controller(run)
    assert controller is not None and not controller.works and "controller.json" in controller.ended
    assert begun_with(run.partial("M2") / "identity.json") is None


@pytest.mark.parametrize("damage", ["cut", "other types", "huge", "controls", "deep"])
def test_commands_that_read_logs_go_on(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path / "toy").folder
    for stage in ("M1", "round_1/candidates"):
        run.partial(stage).mkdir(parents=True)
        run.log_file(stage).parent.mkdir(exist_ok=True)
        run.progress_file(stage).write_bytes(BAD[damage])
        (run.partial(stage) / "metrics.jsonl").write_bytes(BAD[damage] + b"\n" + BAD[damage])
    run.partial("round_1/health").mkdir()
    (run.partial("round_1/health") / "health.json").write_bytes(BAD[damage])
    leases = run.partial("round_1/candidates") / "candidates.jsonl.shards"
    leases.mkdir()
    (leases / "shard_0.lease").write_bytes(BAD[damage])
    assert len(held_shards(run.partial("round_1/candidates"))) == 1
    works = orjson.dumps({"pid": os.getpid(), "host": os.uname().nodename})
    states = [works, BAD[damage]]
    controller_file(run).write_bytes(works)
    monkeypatch.setattr(status_view.time, "sleep", lambda seconds: controller_file(run).write_bytes(states.pop()))
    for words in (["status"], ["status", "--json"], ["status", "--watch"], ["launch", "progress"]):
        done = CliRunner().invoke(app, [*words, str(run.root)], env={"COLUMNS": "80"})
        assert done.exit_code == 0, (words, done.exception)
        assert not set(done.output) & set("\x1b\u202e\x07\0")


def test_the_report_leaves_damaged_lines_out(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "toy", rounds=1)
    run.model(1)
    run.round(1)
    run.model(2)
    for path in run.folder.root.rglob("metrics.jsonl"):
        path.write_bytes(b"\n".join([*BAD.values(), path.read_bytes(), *BAD.values()]))
    assert "<html" in render(run.folder.root)


@pytest.mark.parametrize("plan", [b"null", b"{}", b"[", b'{"stages": [], "step": {"tokens": 1, "total": 0}}'])
def test_a_plan_that_is_none_is_named(plan: bytes, tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "toy", rounds=1).folder
    (run.root / "plan.json").write_bytes(plan)
    done = CliRunner().invoke(app, ["report", str(run.root)])
    assert "plan.json is not what `srlm plan CONFIG --json` prints" in str(done.exception)


@pytest.mark.parametrize("damage", ["not UTF-8", "empty", "NUL", "not JSON"])
def test_a_damaged_tracking_id_is_made_anew(damage: str, tmp_path: Path) -> None:
    (tmp_path / "tracking_id").write_bytes(BAD[damage])
    found = tracking_id(tmp_path)
    assert len(found) == 32 and tracking_id(tmp_path) == found
