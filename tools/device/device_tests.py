"""`srlm bench device`: tests as a benchmark. Each test is a row with its seconds and its outcome, written as soon as it
is done, so that a cut-off keeps those before it."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer

from srlm_mega.tools.bench_kernels import find_device
from srlm_mega.tools.bench_record import BenchRow, make_record, make_row, write_record
from srlm_mega.tools.device.first_call import gpu_name
from srlm_mega.tools.device.parts import TESTS

REASON_LETTERS = 400


class Recorder:
    """A plugin of pytest that writes the record after each test."""

    def __init__(self, json: Path, settings: Mapping[str, object]) -> None:
        self.json, self.settings = json, settings
        self.rows: dict[str, BenchRow] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the test's call, or the phase in which it was skipped or failed."""
        if report.when != "call" and report.passed:
            return
        reason = "" if report.passed else f"{report.longrepr}"[-REASON_LETTERS:]
        labels = {"outcome": report.outcome} | ({"reason": reason} if reason else {})
        self.rows[report.nodeid] = make_row(report.nodeid, "s", [report.duration], "neither", labels)
        device = find_device()
        record = make_record("device tests", self.settings, self.rows.values(), ("triton",), gpu_name(device))
        write_record(record, self.json)


def main(
    words: Annotated[list[str], typer.Argument(help="What pytest is given: files, -k, -m.")],
    json: Annotated[Path, typer.Option(help="The record to write.")],
) -> None:
    """Run tests and record them."""
    figures = json.with_name(f"{json.stem}_figures.json")  # what the tests measured, written at their end
    argv = ["-q", "-p", "no:cacheprovider", f"--rootdir={TESTS.parent}", f"--gpu-results={figures}", *words]
    settings = {"pytest": words, "cuda": torch.version.cuda}
    sys.exit(pytest.main([*argv, "-c", str(TESTS.parent / "pyproject.toml")], plugins=[Recorder(json, settings)]))


if __name__ == "__main__":
    typer.run(main)
