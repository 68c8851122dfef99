"""The second try that .ci/run gives a failed test with the marker `timing`, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

TESTS = Path(__file__).parent
RERUN = TESTS.parent / ".ci" / "rerun.py"
BAD_LUCK = """
@pytest.mark.timing
@pytest.mark.parametrize("name", ["a b", "c/d"])
def test_bad_luck(name):
    tries = Path("tries")
    tries.write_text(tries.read_text() + name if tries.exists() else name)
    assert tries.read_text().count(name) == 2
"""
BAD_LUCK_IN_A_FIXTURE = """
@pytest.fixture
def cluster():
    tries = Path("tries")
    assert tries.exists() or tries.touch(), "the daemon did not start"
@pytest.mark.timing
def test_bad_luck(cluster):
    pass
"""
BAD_LUCK_OF_MANY = """
@pytest.fixture(scope="module")
def launched():
    tries = Path("tries")
    assert tries.exists() or tries.touch(), "a rank did not answer"
@pytest.mark.timing
@pytest.mark.parametrize("number", range(9))
def test_many(launched, number):
    pass
"""
FAILED_LAUNCH = """
Path("worker.py").write_text("import os; os.path.exists('tries') or os.mkdir('tries') or exit('a port was taken')")
failures = []
@pytest.mark.parametrize("number", range(9))
def test_many(launch, number):
    if failures:
        raise failures[0]
    try:
        launch(1, Path("worker.py"))
    except AssertionError as failure:
        failures.append(failure)
        raise
"""
BROKEN = """
@pytest.mark.timing
def test_broken():
    assert False
"""
OTHER = """
def test_other():
    assert False
"""
MANY = """
@pytest.mark.timing
@pytest.mark.parametrize("number", range(7))
def test_many(number):
    assert False
"""


def ci(folder: Path, tests: str, *first: str) -> tuple[int, str]:
    """Both tries in a folder of these tests, as .ci/run makes them: exit code, and what the second one printed."""
    (folder / "pytest.ini").write_text(
        "[pytest]\naddopts = -p conftest -p xdist.plugin\nmarkers =\n    timing: may run again\n"
    )
    (folder / "test_all.py").write_text(f"from pathlib import Path\nimport pytest\ndef test_good(): pass\n{tests}")
    settings = os.environ | {
        "PYTHONPATH": str(TESTS),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # other plugins cost seconds
    pytest_command = Path(sys.executable).with_name("pytest")
    argv = [pytest_command, *first, "--junitxml=results.xml"]
    assert subprocess.run(argv, cwd=folder, env=settings, capture_output=True).returncode in (1, 2)
    argv = [sys.executable, RERUN, "results.xml"]
    done = subprocess.run(argv, cwd=folder, env=settings, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("first", [[], ["-n", "1", "--dist", "loadfile"]])
def test_bad_luck_is_no_failure_and_is_named(tmp_path: Path, first: list[str]) -> None:
    code, said = ci(tmp_path, BAD_LUCK, *first)
    assert code == 0
    assert "alone:\n  test_all.py::test_bad_luck[a b]\n  test_all.py::test_bad_luck[c/d]\n" in said
    assert "2 passed" in said.splitlines()[-1]


@pytest.mark.parametrize("when", ["", "    yield\n"], ids=["before", "behind"])
def test_a_fixture_may_have_bad_luck(tmp_path: Path, when: str) -> None:
    code, said = ci(tmp_path, BAD_LUCK_IN_A_FIXTURE.replace("def cluster():\n", f"def cluster():\n{when}"))
    assert code == 0 and "1 passed" in said.splitlines()[-1]


@pytest.mark.parametrize("tests", [BAD_LUCK_OF_MANY, FAILED_LAUNCH], ids=["a fixture", "a launch"])
@pytest.mark.parametrize("first", [[], ["-n", "1", "--dist", "loadfile"]])
def test_what_many_tests_share_fails_once(tmp_path: Path, tests: str, first: list[str]) -> None:
    """One failure; the other tests are skipped; all of them run again, a launch's without the marker too."""
    code, said = ci(tmp_path, tests, *first)
    counted = ElementTree.parse(tmp_path / "results.xml").getroot()[0].attrib
    assert (int(counted["failures"]) + int(counted["errors"]), counted["skipped"]) == (1, "8")
    assert code == 0 and "9 passed" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("tests", "last"),
    [
        (BROKEN, "1 failed"),
        (BAD_LUCK + BROKEN, "1 failed, 2 passed"),
        (BAD_LUCK + OTHER, "no second try: these failed without the marker `timing`: test_all.test_other"),
        (OTHER, "no second try: these failed without the marker `timing`: test_all.test_other"),
        ("import absent", "no second try: these failed without the marker `timing`: .test_all"),
        (MANY, "no second try: 7 tests with the marker `timing` failed"),
    ],
)
def test_what_stays_a_failure(tmp_path: Path, tests: str, last: str) -> None:
    code, said = ci(tmp_path, tests)
    assert code == 1 and last in said.splitlines()[-1]


def test_no_test_has_run(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, RERUN, tmp_path / "results.xml"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "no second try: no test has run\n")
