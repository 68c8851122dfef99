"""Replicas: several processes that each load the model and take shards from one list. The functions here run in the
process that starts them, which loads no model: it watches them and merges the shards."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from srlm_mega.errors import CANNOT_CONTINUE, USER_ERROR, CannotContinue, UserError
from srlm_mega.run.progress import read_progress
from srlm_mega.sampling.sampling_rate import ShardWatch
from srlm_mega.sampling.shards import WAIT_SECONDS, ShardFiles, ShardReport

TERMINATE_SECONDS = 30.0  # between SIGTERM and SIGKILL
R = TypeVar("R")


def run_replicas(
    files: ShardFiles[R], start: Callable[[int], subprocess.Popen[bytes]], replicas: int, watch: ShardWatch
) -> None:
    """Start replicas 0, 1, ..., wait until every shard is finished, and merge. The others take over the shards of a
    replica that ends. UserError or CannotContinue as a replica reports it; RuntimeError when all have ended."""
    if not files.merged:
        files.prepare()
        seen = set[int]()
        pass_new_reports(files, seen, watch.earlier)
        alive = {number: start(number) for number in range(replicas)}
        try:
            while missing := files.missing():
                pass_new_reports(files, seen, watch.finished)
                for number in [number for number, process in alive.items() if process.poll() is not None]:
                    handle_end(files, number, alive.pop(number).returncode)
                if not alive and files.missing():
                    raise RuntimeError(
                        f"all {replicas} replicas ended, {len(missing)} shards are not finished: their last lines "
                        "above say why; the same command resumes the stage"
                    )
                time.sleep(WAIT_SECONDS)
            pass_new_reports(files, seen, watch.finished)
        finally:
            terminate(list(alive.values()))
        files.merge()
    files.tidy()


def terminate(processes: list[subprocess.Popen[bytes]]) -> None:
    """Terminate processes: SIGTERM first, which srun passes on to its tasks, and SIGKILL after 30 seconds."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def pass_new_reports(files: ShardFiles[R], seen: set[int], on_finished: Callable[[ShardReport], None]) -> None:
    """Call `on_finished` with the reports of finished shards whose number is not in `seen`, and add them to it."""
    for shard in files.finished():
        if shard.number not in seen:
            seen.add(shard.number)
            on_finished(files.report(shard))


def handle_end(files: ShardFiles[R], number: int, code: int) -> None:
    """Release the shards of a replica that ended. UserError or CannotContinue when it left such a reason."""
    said = read_progress(replica_progress(files.folder, number))
    if said.exit_code == CANNOT_CONTINUE:
        raise CannotContinue(said.message)
    if said.exit_code == USER_ERROR:
        raise UserError(said.message)
    files.release(number)
    if code:
        print(f"replica {number} ended with code {code}; the others take over its shards", flush=True)


def replica_progress(folder: Path, number: int) -> Path:
    """Return the file in which a replica leaves the reason when it ends early."""
    return folder / f"replica_{number}.progress.json"
