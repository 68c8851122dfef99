"""Short whole runs that are disturbed and resumed, and what must then be as if nothing had happened."""

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import early_stopping_run
import orjson
from interruptions import MARK, Interruption, interrupt, orphans, wait_for_moment
from test_main_road import contents

SRLM = str(Path(sys.executable).parent / "srlm")
TRACEBACK = re.compile(r'Traceback \(most recent|^ +File ".*", line \d', re.MULTILINE)  # its end may be shown alone
PYTHONS_OWN = "init_import_site"  # Ctrl-C before Python has begun with us
ENDS = {-9, 0, 1, 4, -15, -2, 130}  # killed; too late; crashed; stopped; before it was ready to answer a signal
TURN = 20  # trials, before the same begins with other numbers
# Outputs that are made anew in a trial, the others being there: one of these groups, drawn at random, or all of them.
WINDOWS = (
    ("seed", "M0"),
    ("M1", "M1/evaluation"),
    ("round_1/prompts", "round_1/candidates", "round_1/judgements", "round_1/pairs", "round_1/health"),
    ("round_1/reference", "M2", "M2/evaluation"),
)
STAGES = tuple(stage for window in WINDOWS for stage in window)
SAMPLING = WINDOWS[2]
TRAINING = WINDOWS[3]


def arguments(prompts: Path, *overrides: str) -> list[str]:
    """Of `srlm run` in a folder where the run is to be `run`: the name is in config.yaml, which is compared too."""
    small = ("trainer.save_interval=3", "sampler.shard_size=1", "launch.threads_per_process=1")
    return early_stopping_run.small_run(Path("run"), prompts, *small, *overrides)


@dataclass
class Trial:
    """A run in `folder`/run that is disturbed, and what became of it."""

    folder: Path
    arguments: Sequence[str]
    interruptions: list[Interruption] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    left_alive: list[list[str]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    @property
    def tracebacks(self) -> list[str]:
        """What commands printed that ended in one."""
        return [text for text in self.outputs if TRACEBACK.search(text) and PYTHONS_OWN not in text]

    def start(self, **environment: str) -> "subprocess.Popen[bytes]":
        """`srlm run`, marked with all that it starts."""
        one_thread = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", MARK: str(self.folder)}
        with (self.folder / "said").open("wb") as said:
            return subprocess.Popen(
                [SRLM, *self.arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
                env=os.environ | one_thread | environment,
            )

    def end(self, process: "subprocess.Popen[bytes]", limit: float = 600) -> int:
        """Wait for its end, and for that of all that it started; its exit code."""
        code = process.wait(limit)
        self.outputs.append(f"code {code}\n{(self.folder / 'said').read_text(errors='replace')}")
        self.left_alive += orphans(str(self.folder))
        return code

    def interrupted(self, rng: random.Random, window: Sequence[str]) -> int:
        """Start it, and interrupt it until it ends; its exit code."""
        process, mark = self.start(), str(self.folder)
        folders = [self.run / stage for stage in window]
        while process.poll() is None:
            wait_for_moment(process, mark, folders, rng)
            done = interrupt(process, mark, rng)
            if done is None or done.way != "pause":
                self.interruptions += [] if done is None else [done]
                break
            self.interruptions.append(done)
        return self.end(process)

    def interrupt_often(self, rng: random.Random, window: Sequence[str]) -> None:
        """Start and interrupt it once or several times."""
        for _ in range(rng.choice([1, 1, 2, 3])):
            code = self.interrupted(rng, window)
            assert code in ENDS, self.outputs[-1]

    def finish(self) -> None:
        """The same command, undisturbed to its end."""
        code = self.end(self.start())
        assert code == 0, f"{self.interruptions}: the resumed run ended with {self.outputs[-1]}"

    def differences(self, undisturbed: Path) -> list[str]:
        """Names of files that are not as in the undisturbed run, in either."""
        theirs, ours = everything(undisturbed), everything(self.run)
        return sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))


def everything(run: Path) -> dict[str, bytes]:
    """All that must not depend on time: docs/architecture.md lists the rest."""
    return contents(run) | {"config.yaml": (run / "config.yaml").read_bytes()}


def without(undisturbed: Path, window: Sequence[str], folder: Path) -> None:
    """A copy of the run, in `folder`/run, in which these outputs are still to be made; with all of them, no run."""
    folder.mkdir(parents=True)
    if tuple(window) != STAGES:
        shutil.copytree(undisturbed, folder / "run")
        for stage in window:
            shutil.rmtree(folder / "run" / stage, ignore_errors=True)  # an evaluation goes with its model


def figures(trial: Trial, same: bool, **more: int) -> str:
    """A trial in numbers, for the table of all of them."""
    counts: Mapping[str, int] = {
        "trials": 1,
        "interruptions": len(trial.interruptions),
        "byte-identical": int(same),
        "processes left alive": len(trial.left_alive),
        "tracebacks": len(trial.tracebacks),
    }
    return orjson.dumps(counts | more).decode()
