"""Several processes that each hold the model and take shards from one list. This is the one that started them: it has
no model, watches, and merges."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from srlm_mega.errors import CANNOT_CONTINUE, USER_ERROR, CannotContinue, UserError
from srlm_mega.run.progress import read_progress
from srlm_mega.sampling.sampling_rate import ShardWatch
from srlm_mega.sampling.shards import WAIT_SECONDS, ShardFiles, ShardReport

PATIENCE_SECONDS = 30.0
R = TypeVar("R")


def run_replicas(
    files: ShardFiles[R], start: Callable[[int], subprocess.Popen[bytes]], replicas: int, watch: ShardWatch
) -> None:
    """Start replicas 0, 1, ... and wait until every shard is there, then merge. The shards of a replica that ends are
    taken by the others. RuntimeError when none is left; what a replica can explain is raised as it says."""
    if not files.merged:
        files.prepare()
        seen = set[int]()
        pass_on(files, seen, watch.earlier)
        alive = {number: start(number) for number in range(replicas)}
        try:
            while missing := files.missing():
                pass_on(files, seen, watch.finished)
                for number in [number for number, process in alive.items() if process.poll() is not None]:
                    ended(files, number, alive.pop(number).returncode)
                if not alive and files.missing():
                    raise RuntimeError(f"all {replicas} replicas ended with {len(missing)} shards to go: see above")
                time.sleep(WAIT_SECONDS)
            pass_on(files, seen, watch.finished)
        finally:
            end(list(alive.values()))
        files.merge()
    files.tidy()


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End replicas whose work is no longer wanted. SIGTERM first: srun passes it on to its tasks."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def pass_on(files: ShardFiles[R], seen: set[int], on_finished: Callable[[ShardReport], None]) -> None:
    """The reports of shards that were finished since the last time."""
    for shard in files.finished():
        if shard.number not in seen:
            seen.add(shard.number)
            on_finished(files.report(shard))


def ended(files: ShardFiles[R], number: int, code: int) -> None:
    """A replica is gone: its shards are free again; a mistake or a stop it explained ends the stage."""
    said = read_progress(replica_progress(files.folder, number))
    if said.exit_code == CANNOT_CONTINUE:
        raise CannotContinue(said.message)
    if said.exit_code == USER_ERROR:
        raise UserError(said.message)
    files.release(number)
    if code:
        print(f"replica {number} ended with {code}; the others take over its shards", flush=True)


def replica_progress(folder: Path, number: int) -> Path:
    """Where a replica leaves the reason when it ends early."""
    return folder / f"replica_{number}.progress.json"
