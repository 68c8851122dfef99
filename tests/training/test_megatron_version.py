"""Versions of megatron-core: which are taken, and what one makes of another's checkpoints."""

from pathlib import Path

import megatron.core
import pytest
import torch

from srlm_mega.config.training import ParallelConfig, TrainerConfig
from srlm_mega.errors import UserError
from srlm_mega.training.checkpoint import Checkpoints
from srlm_mega.training.megatron_version import VERSIONS, megatron_version
from srlm_mega.training.topology import Topology, process_group


def test_only_the_known_versions() -> None:
    assert [megatron_version(known) for known in ("0.16.1", "0.19.2")] == list(VERSIONS.values())
    with pytest.raises(
        ValueError, match=r"takes megatron-core 0\.16\.1 or 0\.19\.2, found 0\.16\.2: pip install .*==0\.16\.1$"
    ):
        megatron_version("0.16.2")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_another_version_is_refused_before_anything_is_started(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron.core, "__version__", "0.18.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"found 0\.18\.0"), process_group(TrainerConfig(device=device)):
        pass


def test_a_newer_versions_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core 0.16 says: 'str' object has no attribute 'iterdir'."""
    monkeypatch.setattr(megatron.core, "__version__", "0.16.1")
    alone = Topology(0, 1, torch.device("cpu"), 0, 1, 0, 1, 0, 1, ParallelConfig())
    (tmp_path / "iter_0000002").mkdir()
    with pytest.raises(UserError, match=r"by a newer megatron-core, and 0\.16\.1 does not read it: resume with"):
        Checkpoints(tmp_path, alone, TrainerConfig()).load(tmp_path / "iter_0000002", [], None, 0)
