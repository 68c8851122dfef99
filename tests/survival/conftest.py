"""Trials: how many, from which seed, from which undisturbed run; and the table of what became of them."""

import fcntl
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
from small_runs import TURN, Trial, arguments, figures


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument `number` is run for the trials whose turn is its own, by its file's TURNS."""
    if "number" in metafunc.fixturenames:
        turns, trials = metafunc.module.TURNS[metafunc.function.__name__], metafunc.config.getoption("survival_trials")
        metafunc.parametrize("number", [number for number in range(trials) if number % TURN in turns])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """All trials in one table, as docs/measured.md has it."""
    sums: dict[str, Counter[str]] = {}
    for report in [one for outcome in ("passed", "failed") for one in terminalreporter.getreports(outcome)]:
        for name, value in report.user_properties:
            if name.startswith("survival: "):
                sums.setdefault(name.removeprefix("survival: "), Counter()).update(orjson.loads(str(value)))
    if sums:
        columns = list(dict.fromkeys(column for counts in sums.values() for column in counts))
        total = sum(sums.values(), Counter())
        terminalreporter.section("survival")
        terminalreporter.write_line(f"| what | {' | '.join(columns)} |")
        terminalreporter.write_line("|---" * (len(columns) + 1) + "|")
        for what, counts in [*sums.items(), ("all", total)]:
            cells = [str(counts[column]) if column in counts or what == "all" else "-" for column in columns]
            terminalreporter.write_line(f"| {what} | {' | '.join(cells)} |")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Of this test and --survival-seed alone."""
    return random.Random(f"{request.config.getoption('survival_seed')}/{request.node.nodeid}")


@contextmanager
def made_once(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """A folder for all of pytest's workers, and whether it is still to be filled."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "survival"
    root.mkdir(exist_ok=True)
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root / name, not (root / name / "finished").exists()
        (root / name / "finished").touch()


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of all runs' prompts, which config.yaml names."""
    with made_once(tmp_path_factory, "prompts") as (folder, _):
        folder.mkdir(exist_ok=True)
        return folder / "prompts.jsonl"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    """A run that nothing disturbed."""
    with made_once(tmp_path_factory, "undisturbed") as (folder, absent):
        if absent:
            folder.mkdir()
            Trial(folder, arguments(prompts)).finish()
        return folder / "run"


@pytest.fixture
def judged(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Writes a trial's figures into the results, and then asserts that it is as if nothing had happened."""

    def judge(what: str, trial: Trial, undisturbed: Path, **more: int) -> None:
        different = trial.differences(undisturbed)
        more |= {"used in silence": int(bool(different))} if "damages" in more else {}
        record_property(f"survival: {what}", figures(trial, not different, **more))
        story = "\n".join([*map(str, trial.interruptions), *trial.outputs])
        assert different == [], f"not the bytes of the undisturbed run:\n{story}"
        assert trial.left_alive == [], f"still alive:\n{story}"
        assert trial.tracebacks == [], story

    return judge
