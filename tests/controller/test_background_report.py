"""The report that a run does not wait for: when it is made, and that its end changes nothing."""

import time
from pathlib import Path

import pytest
from fake_run import FakeRun

from srlm_mega.controller import background_report as background
from srlm_mega.controller.background_report import BackgroundReport


@pytest.mark.timing
def test_a_page_is_made_while_the_run_goes_on(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "toy").folder
    report = BackgroundReport(run, interval_seconds=0.0)
    report.refresh()
    deadline = time.monotonic() + 120
    while not run.report_file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "No model is evaluated yet." in run.report_file.read_text(encoding="utf-8")
    report.close()


def test_never_two_at_once_and_not_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, begun = FakeRun(tmp_path / "toy").folder, []
    now = 1000.0

    class Slow:
        """A report that takes until it is told to end."""

        ended = False

        def __init__(self, argv: list[str], **_: object) -> None:
            begun.append(argv)

        def poll(self) -> int | None:
            return 0 if Slow.ended else None

    monkeypatch.setattr(background.subprocess, "Popen", Slow)
    monkeypatch.setattr(background.time, "monotonic", lambda: now)
    report = BackgroundReport(run, interval_seconds=60.0)
    report.refresh()
    assert begun == [], "a short run writes its report at its end"
    now = 1061.0
    report.refresh()
    now = 1200.0
    report.refresh()
    assert len(begun) == 1, "the first one is still at work"
    Slow.ended = True
    report.refresh()
    report.refresh()
    assert len(begun) == 2 and begun[0][:3] == ["nice", "-n", "19"] and begun[0][-2:] == ["report", str(run.root)]


@pytest.mark.timing
def test_a_report_that_fails_says_so_in_its_log_only(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "toy").folder
    run.config_file.write_text("nonsense: 1\n", encoding="utf-8")
    report = BackgroundReport(run, interval_seconds=0.0)
    report.refresh()
    deadline = time.monotonic() + 120
    log = run.log_file("report")
    while not log.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "nonsense" in log.read_text(encoding="utf-8") and not run.report_file.exists()
    report.close()
