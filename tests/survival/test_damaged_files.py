"""Damages of every file that a run reads again, finished or not: noticed, named, made good as the message says."""

import random
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from pathlib import Path

import orjson
import pytest
from interruptions import wait_for
from small_runs import SAMPLING, STAGES, TRACEBACK, TRAINING, Trial, arguments, without

from srlm_mega.cli import main as command_line
from srlm_mega.run.manifest import log_name

pytestmark = pytest.mark.extra
TURNS = {"test_the_remedy_leads_to_the_same_bytes": (6,), "test_a_damaged_unfinished_output": (18, 19)}
NUMBER = re.compile(rb"(?<=[:\[, ])\d+")
REDO, REMOVE = re.compile(r"--redo (\S+?)[.,:]?(?=\s|$)"), re.compile(r"or remove (\S+?):")


class Damage(StrEnum):
    """What becomes of a file."""

    FLIPPED_BIT = auto()
    CUT = auto()
    EMPTIED = auto()
    APPENDED = auto()
    REMOVED = auto()
    SWAPPED = auto()
    OTHER_NUMBER = auto()


def damaged(content: bytes, damage: Damage, other: bytes, rng: random.Random) -> bytes | None:
    """The file's new content; None where it is to be removed. The same one where this damage is none to it."""
    place = rng.randrange(len(content)) if content else 0
    match damage:
        case Damage.FLIPPED_BIT:
            flipped = content[place : place + 1]
            return content[:place] + bytes(one ^ (1 << rng.randrange(8)) for one in flipped) + content[place + 1 :]
        case Damage.CUT:
            return content[:place]
        case Damage.EMPTIED:
            return b""
        case Damage.APPENDED:
            return content + rng.choice([b"\0", b"\n", b"{}\n", content[-100:]])
        case Damage.REMOVED:
            return None
        case Damage.SWAPPED:
            return other
        case Damage.OTHER_NUMBER:
            numbers = list(NUMBER.finditer(content))
            if not numbers:
                return content
            one = rng.choice(numbers)
            return content[: one.start()] + b"%d" % (int(one[0]) + 1) + content[one.end() :]


def damage_one(path: Path, others: list[Path], rng: random.Random) -> Damage:
    """Damage a file in a way drawn at random that changes it."""
    content = path.read_bytes()
    while True:
        damage = rng.choice(list(Damage))
        new = damaged(content, damage, rng.choice(others).read_bytes(), rng)
        if new is None:
            path.unlink()
            return damage
        if not same_content(new, content, path.name):
            path.write_bytes(new)
            return damage


def same_content(new: bytes, old: bytes, name: str) -> bool:
    """Whether a file says the same as before: a manifest, whose seal is of what it says, may have other spaces."""
    if name != "manifest.json":
        return new == old
    try:
        return bool(orjson.loads(new) == orjson.loads(old))
    except orjson.JSONDecodeError:
        return False


def checked_files(run: Path) -> list[Path]:
    """The files of finished outputs that are to be as they were written, manifests among them."""
    found = []
    for stage in STAGES:
        manifest = run / stage / "manifest.json"
        found += [manifest, *(run / stage / name for name in orjson.loads(manifest.read_bytes())["files"])]
    return found


@dataclass
class Here:
    """Commands of `srlm` in this process, where they take milliseconds."""

    capture: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit code, and what was printed."""
        self.patch.setattr(sys, "argv", ["srlm", *arguments])
        self.patch.setenv("COLUMNS", "1000")
        code = 0
        try:
            command_line.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except Exception:
            code = 1
            traceback.print_exc()
        said = self.capture.readouterr()
        return code, said.out + said.err


def test_every_damaged_file_is_noticed(
    undisturbed: Path, prompts: Path, tmp_path: Path, rng: random.Random, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    """By `srlm run`, `status` and `report`; in one way per file for twenty trials each."""
    here, folder = Here(capsys, monkeypatch), tmp_path / "trial"
    shutil.copytree(undisturbed, folder / "run")
    monkeypatch.chdir(folder)
    files = checked_files(folder / "run")
    silent, tracebacks, count = [], 0, 0
    for path in files * -(-request.config.getoption("survival_trials") // 20):
        content = path.read_bytes()
        damage = damage_one(path, files, rng)
        if path.name == "manifest.json" and damage is Damage.REMOVED:  # then it is an unfinished output: below
            path.write_bytes(content[:-1])
        name, stage = str(path.relative_to(folder)), path.relative_to(folder / "run").parts[0]
        count += 1
        for command in (arguments(prompts), ["status", "run"], ["report", "run"]):
            code, said = here(*command)
            tracebacks += TRACEBACK.search(said) is not None
            noticed = name in said and "--redo" in said and stage in said and (code == 2 or command[0] == "status")
            if not noticed:
                silent.append(f"{command[0]} after {damage} of {name}: code {code}, {said}")
        path.write_bytes(content)
    assert here(*arguments(prompts))[0] == 0, "restored, it is as it was"
    counts = {"damages": count, "used in silence": len(silent), "tracebacks": tracebacks}
    record_property("survival: damaged files", orjson.dumps(counts).decode())
    assert silent == []


def follow(trial: Trial) -> None:
    """Do what the last message says."""
    said = trial.outputs[-1]
    if (redo := REDO.search(said)) is not None:
        trial.arguments = [*trial.arguments, "--redo", redo[1]]
    else:
        remove = REMOVE.search(said)
        assert remove is not None, f"no remedy: {said}"
        shutil.rmtree(trial.folder / remove[1])
    trial.finish()


def test_the_remedy_leads_to_the_same_bytes(
    undisturbed: Path, prompts: Path, tmp_path: Path, judged: Callable[..., None], rng: random.Random, number: int
) -> None:
    trial = Trial(tmp_path / "trial", arguments(prompts))
    without(undisturbed, (), trial.folder)
    files = checked_files(trial.run)
    path = rng.choice(files)
    damage = damage_one(path, files, rng)
    code = trial.end(trial.start())
    name = str(path.relative_to(trial.folder))
    assert code == 2 and name.removesuffix("/manifest.json") in trial.outputs[-1], (
        f"{damage} of {name}: {trial.outputs}"
    )
    if "move the folder away" in trial.outputs[-1]:
        shutil.rmtree(path.parent)
        trial.finish()
    else:
        follow(trial)
    judged("damaged and made again", trial, undisturbed, damages=1)


@pytest.fixture(scope="session")
def unfinished(undisturbed: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Runs that were killed in the middle of a stage."""

    def killed_in(stage: str, window: tuple[str, ...], begun: str) -> Path:
        trial = Trial(tmp_path_factory.mktemp("unfinished") / "trial", arguments(prompts))
        without(undisturbed, window, trial.folder)
        partial = trial.run / f"{stage}.partial"
        process = trial.start()
        wait_for(lambda: any(partial.glob(begun)), process, str(partial / begun))
        process.kill()
        trial.end(process)
        assert partial.exists(), f"{stage} was finished before the kill"
        return trial.run

    candidates, shards = "round_1/candidates", "candidates.jsonl.shards/shard_*.jsonl"
    return {
        "M2": killed_in("M2", TRAINING, "megatron/iter_*/files.json"),
        candidates: killed_in(candidates, SAMPLING, shards),
    }


def test_a_damaged_unfinished_output(
    undisturbed: Path, unfinished: Mapping[str, Path], prompts: Path, tmp_path: Path, judged: Callable[..., None],
    rng: random.Random, number: int,
) -> None:  # fmt: skip
    """It is not used, or the resumed run says what to do."""
    stage = list(unfinished)[number % 2]
    trial = Trial(tmp_path / "trial", arguments(prompts))
    shutil.copytree(unfinished[stage], trial.run)
    partial = trial.run / f"{stage}.partial"
    files = [path for path in partial.rglob("*") if path.is_file() and log_name(str(path.relative_to(partial))) is None]
    path = rng.choice(files)
    damage = damage_one(path, files, rng)
    if trial.end(trial.start()):
        named = partial if path.name == "identity.json" else path  # it says what the folder was begun with
        assert str(named.relative_to(trial.folder)) in trial.outputs[-1], f"{damage} of {path}: {trial.outputs[-1]}"
        follow(trial)
    judged("damaged while unfinished", trial, undisturbed, damages=1)
