"""The same with two replicas, with early stopping by an endpoint's judge, and with ranks on two hosts."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import pytest
from early_stopping_run import early_stopping, prefers
from fake_endpoint import Asked, FakeEndpoint, Reply, fake_endpoint
from hosts import Host, hosts, skip_without_hosts
from interruptions import MARK, Interruption, Way, orphans, trial_processes, wait_for
from small_runs import SAMPLING, STAGES, Trial, arguments, without

from srlm_mega.evaluation.checkpoint_choice import EarlyStoppingFiles

pytestmark = pytest.mark.extra
TURNS = {
    "test_two_replicas": (7, 8),
    "test_early_stopping_by_an_endpoint": (9,),
    "test_ranks_on_two_hosts": (10,),
}
JUDGED = ("M2", "M2/evaluation")
ON_HOSTS = ("parallel.pipeline_model_parallel_size=2", "launch.nodes=2", "sft.train_iters=6")
TO_M1 = ("--only", "seed", "--only", "M0", "--only", "M1")


@dataclass
class Judge:
    """A judge behind an endpoint that finds the first checkpoint worse than the model before the training. All trials
    ask it at one address, which is in their manifests."""

    endpoint: FakeEndpoint = field(default_factory=FakeEndpoint)
    run: Path = Path()
    hangs: bool = False
    asked: Event = field(default_factory=Event)

    def reply(self, asked: Asked) -> Reply:
        """A verdict about the run that is on now; none to a question from a run that was killed since."""
        self.asked.set()
        if self.hangs:
            return Reply(hang=True)
        files = EarlyStoppingFiles(self.run / "M2.partial")
        return Reply(503) if files.waiting() is None else prefers("older", self.run / "M2.partial", asked)

    def stops(self, folder: Path, prompts: Path) -> Trial:
        """A run that it stops early."""
        self.run = folder / "run"
        settings = early_stopping("judge.model=j", f"judge.endpoint={self.endpoint.url}")
        return Trial(folder, arguments(prompts, *settings))


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    """A server in this process."""
    made = Judge()
    with fake_endpoint(made.reply) as made.endpoint:
        yield made


@pytest.fixture(scope="module")
def stopped_early(undisturbed: Path, prompts: Path, judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that its judge stopped, and nothing disturbed."""
    trial = judge.stops(tmp_path_factory.mktemp("stopped") / "trial", prompts)
    without(undisturbed, JUDGED, trial.folder)
    trial.finish()
    return trial.run


@dataclass
class OnHosts:
    """A run whose M1 is trained on two hosts, by the lines that `srlm run` prints for them."""

    trial: Trial
    pair: Sequence[Host]

    def start(self) -> "list[subprocess.Popen[bytes]]":
        """Each host's line; none where M1 is finished."""
        code = self.trial.end(self.trial.start())
        if code == 0:
            return []
        lines = [line for line in self.trial.outputs[-1].splitlines() if "torchrun_multinode.sh" in line]
        assert code == 3 and len(lines) == 2, self.trial.outputs[-1]
        commands = [f"exec {line}".replace("FIRST_NODE", self.pair[0].name) for line in lines]
        marked = os.environ | {"OMP_NUM_THREADS": "1", MARK: str(self.trial.folder)}
        return [
            subprocess.Popen(host.command(["bash", "-c", command]), cwd=self.trial.folder, env=marked,
                             stdout=(self.trial.folder / host.name).open("wb"), stderr=subprocess.STDOUT)
            for host, command in zip(self.pair, commands, strict=True)
        ]  # fmt: skip

    def interrupted(self, rng: random.Random) -> None:
        """Start them, kill one process or all of a host's at a random moment, and end the others."""
        processes, seen = self.start(), set[int]()
        if not processes:
            return
        wanted = rng.randint(1, 4)

        def started() -> bool:
            seen.update(one.pid for one in trial_processes(str(self.trial.folder)))
            return len(seen) >= wanted

        wait_for(started, processes[0], f"process number {wanted}")
        time.sleep(rng.uniform(0, 4))
        if alive := trial_processes(str(self.trial.folder)):
            with suppress(ProcessLookupError):
                os.kill(rng.choice(alive).pid, signal.SIGKILL)
            self.trial.interruptions.append(Interruption(Way.KILL_STAGE, 1))
        for process in processes:
            process.kill()
            process.wait()
        self.trial.left_alive += orphans(str(self.trial.folder))

    def finish(self) -> None:
        """The same to its end."""
        codes = [process.wait(600) for process in self.start()]
        logs = [self.trial.folder / host.name for host in self.pair]
        assert not any(codes), "\n".join(log.read_text(errors="replace") for log in logs)
        self.trial.finish()


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Host]]:
    """Two hosts."""
    skip_without_hosts()
    with hosts(["left", "right"]) as made:
        yield made


@pytest.fixture(scope="module")
def on_hosts(undisturbed: Path, prompts: Path, pair: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose M1 was trained on two hosts in one go."""
    trial = Trial(tmp_path_factory.mktemp("hosts") / "trial", [*arguments(prompts, *ON_HOSTS), *TO_M1])
    without(undisturbed, STAGES[2:], trial.folder)
    OnHosts(trial, pair).finish()
    return trial.run


def test_two_replicas(
    undisturbed: Path, prompts: Path, tmp_path: Path, judged: Callable[..., None], rng: random.Random, number: int
) -> None:
    """They make what one process makes."""
    trial = Trial(tmp_path / "trial", arguments(prompts, "sampler.num_devices=2"))
    without(undisturbed, SAMPLING, trial.folder)
    trial.interrupt_often(rng, SAMPLING)
    trial.finish()
    (trial.run / "config.yaml").write_bytes((undisturbed / "config.yaml").read_bytes())  # theirs has the number of them
    judged("two replicas", trial, undisturbed)


def kill_while_asked(trial: Trial, judge: Judge) -> None:
    """Kill the controller when the judge has a question, which it does not answer."""
    judge.hangs = True
    judge.asked.clear()
    process = trial.start()
    wait_for(judge.asked.is_set, process, "question to the judge")
    process.kill()
    judge.hangs = False
    assert trial.end(process) == -signal.SIGKILL, trial.outputs[-1]
    trial.interruptions.append(Interruption(Way.KILL_CONTROLLER, 1))
    assert (trial.run / "M2.partial/early_stopping/step_0000002/exported.json").is_file()


def test_early_stopping_by_an_endpoint(
    stopped_early: Path, prompts: Path, judge: Judge, tmp_path: Path, judged: Callable[..., None], rng: random.Random,
    number: int,
) -> None:  # fmt: skip
    trial = judge.stops(tmp_path / "trial", prompts)
    without(stopped_early, JUDGED, trial.folder)
    kill_while_asked(trial, judge)
    trial.interrupt_often(rng, JUDGED)
    trial.finish()
    judged("early stopping by an endpoint's judge", trial, stopped_early)


def test_ranks_on_two_hosts(
    on_hosts: Path, prompts: Path, pair: list[Host], tmp_path: Path, judged: Callable[..., None], rng: random.Random,
    number: int,
) -> None:  # fmt: skip
    trial = Trial(tmp_path / "trial", [*arguments(prompts, *ON_HOSTS), *TO_M1])
    without(on_hosts, ["M1"], trial.folder)
    both = OnHosts(trial, pair)
    for _ in range(rng.choice([1, 1, 2])):
        both.interrupted(rng)
    both.finish()
    judged("ranks on two hosts", trial, on_hosts)
