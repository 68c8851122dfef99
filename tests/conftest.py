"""Shared places."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent  # not from support/: the test of .ci/rerun.py copies this file alone

pytest.register_assert_rewrite("sampler_contract")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where `pytest -m gpu` writes what it measured."""
    parser.addoption("--gpu-results", default=str(ROOT / "docs/results/gpu_tests.json"), help="JSON file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notes in the results which tests .ci/rerun.py may start once more."""
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
def artifacts() -> Path:
    """Where tests leave what a person may want to look at."""
    folder = ROOT / "build" / "test_artifacts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
