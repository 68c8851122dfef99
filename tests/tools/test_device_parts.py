"""The parts of `srlm bench device`: limits, cut-off, leftover time, with trivial commands."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import orjson
import psutil
import pytest
import torch
from fake_run import FakeRun

from srlm_mega.config.file import load_config
from srlm_mega.errors import StopRequested, UserError
from srlm_mega.tools.bench_record import make_record, make_row, read_record, write_record
from srlm_mega.tools.device import parts
from srlm_mega.tools.device.demo_run import record_of
from srlm_mega.tools.device.memory_check import compared
from srlm_mega.tools.device.run_parts import DevicePart, DeviceSummary, PartResult, Skipped, run_parts
from srlm_mega.tools.device.sync_count import counted
from srlm_mega.tools.device_figures import device_figures


def part(name: str, code: str, seconds: float = 20.0, least: float = 0.0) -> DevicePart:
    """A part that runs a line of shell."""
    return DevicePart(name, seconds, least, lambda: ["bash", "-c", code])


def run(some: Sequence[DevicePart], out: Path, minutes: float = 1.0) -> dict[str, PartResult]:
    summary = run_parts(some, out, minutes, dict(os.environ))
    written = orjson.loads((out / "summary.json").read_bytes())
    assert [row["name"] for row in written["parts"]] == [row.name for row in summary.parts]
    return {result.name: result for result in summary.parts}


def test_each_part_has_a_log_and_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run([part("one", f"echo said; echo '{{}}' > {tmp_path}/one.json"), part("two", "exit 3")], tmp_path)
    assert (found["one"].exit_code, found["one"].result, found["one"].failed) == (0, "one.json", False)
    assert (found["two"].exit_code, found["two"].result, found["two"].failed) == (3, None, True)
    assert (tmp_path / "one.log").read_text() == "said\n" and found["two"].command == ("bash", "-c", "exit 3")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("one: done") and "exit code 3, see two.log" in lines[1]


def test_a_part_is_killed_at_its_limit_with_all_it_started(tmp_path: Path) -> None:
    """Its own group, and one that it made, as `srlm run` makes for its stages. What it wrote before stays."""
    code = f"echo '{{}}' > {tmp_path}/hangs.json; setsid sleep 61 & sleep 62 & echo $!; jobs -p; trap '' TERM; wait"
    found = run([part("hangs", code, seconds=1.0), part("next", "true", seconds=59.0)], tmp_path)
    assert found["hangs"].exit_code is None and found["hangs"].result == "hangs.json" and found["hangs"].failed
    assert 1 <= found["hangs"].seconds < 10 and "cut off at its limit" in str(found["hangs"])
    children = [int(word) for word in (tmp_path / "hangs.log").read_text().split()]
    assert len(set(children)) == 2 and not any(running(child) for child in children)
    assert found["next"].exit_code == 0


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_time_that_is_left_over_goes_to_later_parts(tmp_path: Path) -> None:
    found = run([part("short", "true"), part("skipped", "true"), part("last", "true")], tmp_path, minutes=1.0)
    assert found["short"].limit == pytest.approx(20, abs=1)
    assert 38 < found["skipped"].limit < 40 and 55 < found["last"].limit < 60  # seconds may pass on a busy machine
    found = run([part("only", "true")], tmp_path, minutes=2.0)
    assert 119 < found["only"].limit <= 120, "minutes that no part has asked for are left unused"


def test_parts_that_no_longer_fit_are_skipped_with_the_reason(tmp_path: Path) -> None:
    """A later one that needs less still runs."""
    some = [part("uses up", "sleep 1", 2.0), part("long", "true", 20.0, least=5.0), part("short", "true", 1.0)]
    found = run(some, tmp_path, minutes=0.05)
    assert found["long"].skipped is not None and "it needs 5" in found["long"].skipped
    assert found["long"].exit_code is None and not found["long"].failed and not (tmp_path / "long.log").exists()
    assert found["short"].exit_code == 0


def test_a_part_says_when_its_turn_comes_that_it_cannot_run(tmp_path: Path) -> None:
    later = DevicePart("later", 20.0, 0.0, lambda: [] if (tmp_path / "made").exists() else Skipped("nothing was made"))
    found = run([part("first", "true"), later], tmp_path)
    assert found["later"].skipped == "nothing was made" and str(found["later"]) == "later: skipped, nothing was made"


def test_sigterm_ends_the_part_at_work_and_keeps_the_summary(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from srlm_mega.tools.device.run_parts import DevicePart, run_parts
sleep = ["bash", "-c", "echo $$; sleep 60"]
parts = [DevicePart("one", 30, 0, lambda: ["true"]), DevicePart("two", 30, 0, lambda: sleep)]
run_parts(parts, Path({str(tmp_path)!r}), 1.0, dict(os.environ))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "two.log"
    while not (log.is_file() and log.read_text().strip()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert StopRequested.__name__ in process.communicate()[1] and process.returncode == 1
    assert not running(int(log.read_text()))
    summary = orjson.loads((tmp_path / "summary.json").read_bytes())
    assert [one["name"] for one in summary["parts"]] == ["one"] and summary.keys() == vars(
        DeviceSummary(0, 0, ())
    ).keys()


def test_every_part_has_a_command_or_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both forms, and each configuration in them is valid. The parts and their order are the same."""
    names = [one.name for one in parts.gpu_parts(tmp_path)]
    assert names == [one.name for one in parts.smoke_parts(tmp_path)]
    assert names[0] == "environment" and names.index("training") < names.index("trl") < names.index("fp8")
    (tmp_path / "training.json").touch()
    for one in parts.gpu_parts(tmp_path) + parts.smoke_parts(tmp_path):
        command = one.command()
        if not isinstance(command, Skipped):
            assert f"{tmp_path / one.name}.json" in command or one.name in ("precision", "kernel_tests")
            for preset in {"llama2_7b_8gpu", "toy_cpu"} & set(command):
                words = command[command.index(preset) :]
                settings = [word for word in words if "." in word.partition("=")[0] and not word.startswith(("-", "/"))]
                load_config(Path(preset), [word for word in settings if "=" in word])
    monkeypatch.setattr(parts, "find_spec", lambda name: None)
    reasons = {one.name: one.command() for one in parts.gpu_parts(tmp_path)}
    assert reasons["trl"] == Skipped("not installed: trl, accelerate, datasets")
    assert reasons["fp8"] == Skipped("not installed: transformer_engine")


def test_more_layers_on_a_larger_gpu(tmp_path: Path) -> None:
    """7B's layers have 202 million parameters, embedding and output 262 million; ours take 18 bytes of each."""
    file = tmp_path / "environment.json"
    assert parts.layers_that_fit(file, parts.STATE) == parts.DEFAULT_LAYERS
    for memory, ours, both in ((139.8, 16, 8), (79.6, 8, 4), (23.5, 2, 1), (5.0, 1, 1)):
        write_record(make_record("device environment", {}, [make_row(parts.MEMORY, "GiB", [memory])]), file)
        assert parts.layers_that_fit(file, parts.STATE) == ours
        assert parts.layers_that_fit(file, parts.STATE + parts.TRL_STATE) == both


def test_what_was_given_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no part is called trll: environment, "):
        parts.measure_device(1.0, tmp_path, smoke=True, only=["trll"])
    (tmp_path / "summary.json").touch()
    with pytest.raises(UserError, match="give a new folder"):
        parts.measure_device(1.0, tmp_path, smoke=True, only=[])
    if not parts.NVIDIA.exists():
        with pytest.raises(UserError, match="--smoke runs everything tiny"):
            parts.measure_device(1.0, tmp_path / "new", smoke=False, only=[])


def test_waits_are_counted_by_line() -> None:
    lines = Counter[str]()
    with counted(lines, torch.device("cpu")):
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
        torch.ones(3).sum()
    assert lines.total() == 2 and all(line.startswith("test_device_parts.py:") for line in lines)


def test_the_measured_peak_is_compared_with_the_rehearsed_one() -> None:
    measured = make_record("training", {}, [make_row("memory/stage_0_max_allocated_GiB", "GiB", [33.0])], device="H")
    rank = {"peak_bytes": 30 * 2**30, "state_bytes": 20 * 2**30}
    record = compared(measured, {"ranks": [rank]})
    assert record.row("measured / rehearsed").median == pytest.approx(1.1) and record.device == "H"
    with pytest.raises(UserError, match="2 ranks were rehearsed"):
        compared(measured, {"ranks": [rank, rank]})


def test_stages_of_the_demo_become_rows(tmp_path: Path) -> None:
    """Also those of a run that did not get to its end."""
    run = FakeRun(tmp_path / "demo", rounds=1)
    run.model(1)
    record = record_of(tmp_path / "demo", ["run.rounds=1"], 1, torch.device("cpu"))
    assert record.row("M1").median == 21.5 and record.settings["exit_code"] == 1
    assert "M2" not in {row.name for row in record.rows}


@pytest.mark.extra
def test_the_smoke_form_measures(tmp_path: Path, srlm: Path) -> None:
    """As a person starts it, without a GPU: parts end well and leave records of the schema, from which the table of
    main figures is made. `demo` and `precision` are left out: they run what other tests run, for half of the time."""
    names = [one.name for one in parts.smoke_parts(tmp_path) if one.name not in ("demo", "precision")]
    argv = [srlm, "bench", "device", "--smoke", "--minutes", "30", "--out", tmp_path / "device"]
    done = subprocess.run([*argv, *(f"--part={name}" for name in names)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = orjson.loads((tmp_path / "device" / "summary.json").read_bytes())
    assert [one["name"] for one in summary["parts"]] == names
    assert {one["name"] for one in summary["parts"] if one["skipped"] is not None} == {"fp8"}
    for one in summary["parts"]:
        if one["skipped"] is None:
            assert one["exit_code"] == 0 and read_record(tmp_path / "device" / one["result"]).rows
    trl = read_record(tmp_path / "device" / "trl.json")
    assert max(trl.row("difference of losses").samples) < 1e-4
    outcomes = {row.labels["outcome"] for row in read_record(tmp_path / "device" / "kernel_tests.json").rows}
    assert outcomes == {"passed"}
    figures = device_figures(tmp_path / "device").splitlines()
    missing = {line.split(" ")[1] for line in figures if line.endswith("| not yet |")}
    assert missing == {"fp8", "demo", "precision"}
