"""Replicas: processes that load one model each and take shards from one list, and then from the next. The class here
runs in the process that starts them, which loads no model: it watches them, and starts one that died once more."""

import os
import subprocess
import time
from collections import deque
from functools import partial
from pathlib import Path
from threading import Event, Thread

from srlm_mega.config import Config
from srlm_mega.errors import CANNOT_CONTINUE, USER_ERROR, CannotContinue, UserError
from srlm_mega.launch.child_process import die_with
from srlm_mega.launch.sampler_environment import node_of, sampler_process, sampler_variables, stop_container
from srlm_mega.records import PromptTokens
from srlm_mega.run.progress import read_progress
from srlm_mega.sampling.job_files import CurrentJob, ReplicaSettings, SampledModel, write_job
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.sampling.sampling_rate import ShardWatch
from srlm_mega.sampling.shards import WAIT_SECONDS, ShardFiles

TERMINATE_SECONDS = 30.0  # between SIGTERM and SIGKILL
HEARTBEAT, HEARTBEAT_SECONDS = "heartbeat", 10.0


class Replicas:
    """An `OpenModel` of `config.sampler_replicas` processes, each with the model. They start when the first list of
    requests comes: on each node one after the other, the next when the last has loaded, because a node's memory and
    file system do not bear all at once."""

    def __init__(self, config: Config, model: SampledModel, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        ReplicaSettings(model, config.sampler).save(folder)
        self._config, self._folder = config, folder
        self._alive: dict[int, subprocess.Popen[bytes]] = {}
        self._waiting = deque(range(config.sampler_replicas))
        self._jobs = 0
        self._closed = Event()
        Thread(target=self._beat, daemon=True).start()

    def answer(self, files: ShardFiles[PromptTokens], params: SamplingParams, watch: ShardWatch) -> None:
        """Finish all shards as `OpenModel.answer` specifies. UserError or CannotContinue as a replica reports it."""
        write_job(files, params)
        CurrentJob(self._jobs, files.folder).save(self._folder)
        self._jobs += 1
        seen, restarted = {shard.number for shard in files.finished()}, set[int]()
        while True:
            missing = files.missing()
            for shard in files.finished():
                if shard.number not in seen:
                    seen.add(shard.number)
                    watch.finished(files.report(shard))
            if not missing:
                return
            self._tend(files, restarted)
            time.sleep(WAIT_SECONDS)

    def close(self) -> None:
        """End the processes."""
        self._closed.set()
        terminate(list(self._alive.values()))

    def _tend(self, files: ShardFiles[PromptTokens], restarted: set[int]) -> None:
        """See which replicas ended, give their shards to the others, and start the next on each node."""
        for number in [number for number, process in self._alive.items() if process.poll() is not None]:
            code = self._alive.pop(number).returncode
            raise_reason(self._folder, number)
            self._ready(number).unlink(missing_ok=True)
            files.release(number)
            again = number not in restarted
            print(
                f"replica {number} ended with code {code}; its shards are free" + ", it starts again" * again,
                flush=True,
            )
            if again:
                restarted.add(number)
                self._waiting.append(number)
        if not self._alive and not self._waiting:
            raise RuntimeError(
                f"all {self._config.sampler_replicas} replicas ended, {len(files.missing())} shards are not finished: "
                "their last lines above say why; the same command resumes the stage"
            )
        loading = {node_of(number, self._config) for number in self._alive if not self._ready(number).exists()}
        for number in list(self._waiting):
            if node_of(number, self._config) not in loading:
                loading.add(node_of(number, self._config))
                self._waiting.remove(number)
                self._alive[number] = self._started(number)

    def _started(self, number: int) -> "subprocess.Popen[bytes]":
        """Start `srlm replica` in the sampler's environment; it ends with this process."""
        command = sampler_process(self._config, ["replica", str(self._folder), str(number)], number)
        stop_container(command)  # one whose client was killed
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # the process that starts them answers Ctrl-C for all
            preexec_fn=partial(die_with, os.getpid()),
            env=sampler_variables(os.environ, self._config, number),
        )

    def _ready(self, number: int) -> Path:
        return ready_file(self._folder, number)

    def _beat(self) -> None:
        """Show the replicas that this process lives: one on another node does not end with it."""
        while not self._closed.is_set():
            (self._folder / HEARTBEAT).touch()
            self._closed.wait(HEARTBEAT_SECONDS)


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
        stop_container(process.args)


def raise_reason(folder: Path, number: int) -> None:
    """Raise UserError or CannotContinue when a replica that ended left such a reason."""
    said = read_progress(replica_progress(folder, number))
    if said.exit_code == CANNOT_CONTINUE:
        raise CannotContinue(said.message)
    if said.exit_code == USER_ERROR:
        raise UserError(said.message)


def replica_progress(folder: Path, number: int) -> Path:
    """Return the file in which a replica leaves the reason when it ends early."""
    return folder / f"replica_{number}.progress.json"


def ready_file(folder: Path, number: int) -> Path:
    """Return the file that a replica makes when its model is loaded."""
    return folder / f"replica_{number}.ready"


def ready_replicas(folder: Path) -> int:
    """Return the number of replicas that have loaded their model."""
    return len(list(folder.glob("replica_*.ready")))
