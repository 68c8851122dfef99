"""A replica's own process (`srlm replica`): it loads the model and works on one job after the other, until it is ended
or the process that started it is gone."""

import time
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from srlm_mega.errors import DISK_FAILED, ENGINE_DIED, CannotContinue, UserError, exit_code, reason
from srlm_mega.launch.child_process import die_with_parent, show_stacks_when_asked
from srlm_mega.run.progress import Progress
from srlm_mega.sampling.job_files import CurrentJob, ReplicaSettings
from srlm_mega.sampling.local_model import LocalModel
from srlm_mega.sampling.replicas import HEARTBEAT, HEARTBEAT_SECONDS, ready_file, ready_replicas, replica_progress
from srlm_mega.sampling.sampler import EngineDied
from srlm_mega.sampling.sampling_rate import Unwatched
from srlm_mega.sampling.shards import WAIT_SECONDS

SILENT_SECONDS = 30 * HEARTBEAT_SECONDS  # without a heartbeat of the process that hands out jobs


def work_as_replica(folder: Path, number: int) -> int:
    """Work on the jobs of a folder. Returns the exit code; the message of a UserError or CannotContinue, or of a disk
    that failed, is left for the process that started this one."""
    die_with_parent()
    show_stacks_when_asked()
    settings = ReplicaSettings.load(folder)
    try:
        with closing(LocalModel(settings.sampler, settings.model, number, partial(ready_replicas, folder))) as model:
            ready_file(folder, number).touch()
            for job in jobs(folder):
                model.answer_job(job.shards, Unwatched())
    except (UserError, CannotContinue, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_FAILED:
            raise
        with suppress(OSError):  # on a full disk the exit code has to do
            Progress(replica_progress(folder, number)).failed(exit_code(error), reason(error))
        return exit_code(error)
    except EngineDied as error:
        print(f"replica {number}: {error}", flush=True)
        return ENGINE_DIED
    return 0


def jobs(folder: Path) -> Iterator[CurrentJob]:
    """Yield each job of the folder once, as it comes; end when no heartbeat has been seen for five minutes."""
    done, beat, heard = -1, 0, time.monotonic()
    while time.monotonic() - heard < SILENT_SECONDS:
        job = CurrentJob.load(folder)
        if job is not None and job.number > done:
            yield job
            done, heard = job.number, time.monotonic()
        elif (now := heartbeat(folder)) != beat:
            beat, heard = now, time.monotonic()
        time.sleep(WAIT_SECONDS)


def heartbeat(folder: Path) -> int:
    """Return when the heartbeat was written last, in nanoseconds of its own node's clock; 0 without one."""
    path = folder / HEARTBEAT
    return path.stat().st_mtime_ns if path.exists() else 0
