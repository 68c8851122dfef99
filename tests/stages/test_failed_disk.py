"""A disk that fails ends a stage's processes with their reason, whichever of their files it was."""

import errno
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from srlm_mega.errors import CANNOT_CONTINUE, CannotContinue
from srlm_mega.run.progress import Progress, read_progress
from srlm_mega.sampling import replica_process
from srlm_mega.sampling.replicas import raise_reason
from srlm_mega.stages.run_stages import record_failure


class Broken(io.StringIO):
    """A log on such a disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_log_that_fails_hides_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Broken())
    error = OSError(errno.EIO, os.strerror(errno.EIO), "M2/metrics.jsonl")
    assert record_failure(error, Progress(tmp_path / "progress.json")) == CANNOT_CONTINUE
    state = read_progress(tmp_path / "progress.json")
    assert (state.exit_code, state.message.partition(":")[0]) == (CANNOT_CONTINUE, "M2/metrics.jsonl")


def test_a_replica_leaves_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a crash; what is no failure of the disk still is."""

    def fails(*arguments: object) -> None:
        raise OSError(number, os.strerror(number), "shard_00000.jsonl")

    monkeypatch.setattr(replica_process, "die_with_parent", lambda: None)
    monkeypatch.setattr(replica_process, "show_stacks_when_asked", lambda: None)
    monkeypatch.setattr(replica_process.ReplicaSettings, "load", lambda folder: SimpleNamespace(sampler=0, model=0))
    monkeypatch.setattr(replica_process, "LocalModel", fails)
    for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
        assert replica_process.work_as_replica(tmp_path, 0) == CANNOT_CONTINUE
        with pytest.raises(CannotContinue, match=rf"shard_00000\.jsonl: {os.strerror(number)}"):
            raise_reason(tmp_path, 0)
    number = errno.ENOENT
    with pytest.raises(OSError, match="No such file"):
        replica_process.work_as_replica(tmp_path, 0)
