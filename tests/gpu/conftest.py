"""Tests on a CUDA device: `pytest -m gpu` runs these and only these. None of them has been run yet.

Their code runs in every test run in a shrunken form, on the CPU.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_runs import Figures, fresh_device

from srlm_mega.run.provenance import PACKAGES, package_version


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without a device there is nothing to run on."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def emptied_device() -> None:
    """Every test starts from what it allocates itself, and measures its own peak."""
    fresh_device()


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Iterator[Figures]:
    """What the tests measured; written at the end to `--gpu-results` when there was a device."""
    measured: Figures = {}
    yield measured
    if measured and torch.cuda.is_available():
        result = {
            "device": torch.cuda.get_device_name(),
            "versions": {name: package_version(name) for name in (*PACKAGES, "transformer-engine", "flash-attn")},
            "figures": measured,
        }
        file = Path(pytestconfig.getoption("gpu_results"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n")
