"""Errors of the operating system in words: which file, what is wrong with it, what to do, and the exit code."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from places import TOY

from srlm_mega.config.file import load_config
from srlm_mega.controller import stage_process
from srlm_mega.controller.stage_process import StageProcess, raise_failure
from srlm_mega.errors import (
    CANNOT_CONTINUE,
    CRASHED,
    USER_ERROR,
    CannotContinue,
    StageCrashed,
    exit_code,
    naming,
    reason,
)
from srlm_mega.records import Prompt, write_jsonl
from srlm_mega.run.files import write_atomic
from srlm_mega.run.plan import find_stage
from srlm_mega.run.presence import announced
from srlm_mega.run.progress import Progress, read_progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.sampling.shards import write_durably
from srlm_mega.stages import run_stages


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (errno.ENOSPC, CANNOT_CONTINUE, r"MiB of [\d,]+ MiB are free on its file system.*Make room there; the same"),
        (errno.EDQUOT, CANNOT_CONTINUE, r"quota there is used up .*MiB are free"),
        (errno.EIO, CANNOT_CONTINUE, r"file system failed .*the same command resumes"),
        (errno.ESTALE, CANNOT_CONTINUE, r"file system failed .*the same command resumes"),
        (errno.EROFS, USER_ERROR, r"read-only: .*give another run\.dir"),
        (errno.EACCES, USER_ERROR, r"you may not do this there"),
        (errno.ENAMETOOLONG, USER_ERROR, r"its last part 7: give a shorter one"),
        (errno.ENOENT, USER_ERROR, r"give another path"),
    ],
)
def test_what_to_do_about_an_operating_systems_error(tmp_path: Path, number: int, code: int, said: str) -> None:
    error = OSError(number, os.strerror(number), str(tmp_path / "x.safet"))
    assert exit_code(error) == code
    assert reason(error).startswith(f"{tmp_path}/x.safet: {os.strerror(number)}: ")
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(reason(error))


def test_nothing_is_said_of_the_room_where_the_place_is_not_known() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        said = reason(OSError(number, os.strerror(number)))
        assert "MiB" not in said and said.startswith("a file without a name: ") and "ake room" in said


def test_a_failed_write_names_its_file(tmp_path: Path) -> None:
    """The system names none: a disk that is full shows when the bytes go out."""
    full = tmp_path / "prompts.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError) as failed:
        write_jsonl(full, [Prompt("p", "x" * 10_000, "test")])
    assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, str(full))

    def no_room(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError) as failed:
        write_durably(tmp_path / "shard.jsonl", no_room)
    assert failed.value.filename == str(tmp_path / "shard.jsonl")
    with pytest.raises(OSError) as failed, naming(tmp_path / "outer"), naming(tmp_path / "inner"):
        no_room(tmp_path)
    assert failed.value.filename == str(tmp_path / "inner")


def test_a_stage_on_a_full_disk_says_which_one_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file where that is known, else its folder; also when not even the reason can be written down."""
    run, config = RunDir(tmp_path / "run"), load_config(TOY, [f"run.dir={tmp_path / 'run'}"])

    def no_room(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_stages, "resolve_name", lambda name: no_room)
    stage, samplers = find_stage(config, "seed"), Samplers(config, tmp_path)
    assert run_stages.run_stage(run, samplers, stage) == CANNOT_CONTINUE
    message = read_progress(run.progress_file("seed")).message
    assert message.startswith(f"{run.partial('seed')}: No space left on device: ") and "MiB are free" in message
    run.progress_file("seed").unlink()
    monkeypatch.setattr(Progress, "failed", no_room)
    assert run_stages.run_stage(run, samplers, stage) == CANNOT_CONTINUE


def test_a_full_disk_hides_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller's last words about itself fail there too."""

    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = RunDir(tmp_path)
    with pytest.raises(CannotContinue, match="M1 ended"), announced(run):
        monkeypatch.setattr(os, "fsync", no_room)
        raise CannotContinue("M1 ended")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["controller.json"], "nor a half"


def test_a_process_that_could_not_say_why_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk that was full for it is full for the controller too."""
    run, log = RunDir(tmp_path), tmp_path / "M1.log"
    write_atomic(log, b"it ended\n")
    process = StageProcess(SimpleNamespace(wait=lambda: 1), log, 0, None)  # type: ignore[arg-type]
    with pytest.raises(StageCrashed, match=r"M1 ended with exit code 1\. (.|\n)*it ended"):
        raise_failure("M1", process, run)
    monkeypatch.setattr(stage_process, "is_full", lambda path: True)
    with pytest.raises(CannotContinue, match=rf"M1 ended with exit code 1\. {tmp_path}: No space left .*Make room"):
        raise_failure("M1", process, run)
    assert exit_code(OSError(errno.EINVAL, "Invalid argument")) == CRASHED
