"""Inputs that no command can use: each ends in one message of a screen and code 2, and leaves nothing behind."""

import os
import re
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import yaml
from typer.main import get_command

from srlm_mega.cli import main as command_line
from srlm_mega.config.file import load_config, to_yaml
from srlm_mega.controller import loop
from srlm_mega.errors import USER_ERROR
from srlm_mega.text import MESSAGE_CHARACTERS, visible

REPEATED = re.compile(r"<([^<>]+)\*(\d+)>")
USAGE_CHARACTERS = 300
COMMAND = get_command(command_line.app)  # made once, which takes longer than most of these commands
INPUTS: dict[str, Any] = yaml.load((Path(__file__).parent / "bad_inputs.yaml").read_bytes(), yaml.CSafeLoader)
Files = dict[str, str]


def spelled(text: str) -> str:
    """A text of the list with its repetitions written out."""
    return REPEATED.sub(lambda found: found[1] * int(found[2]), text)


def entries(group: str) -> list[tuple[Any, str]]:
    """What a group holds, with the encoding in which it is written."""
    return [(one, "utf-8") for one in INPUTS[group]] + [(one, "latin-1") for one in INPUTS.get(f"{group}_bytes", ())]


def word(text: str, encoding: str, folder: Path) -> str:
    """A word of a command line, as Python decodes what the shell hands over."""
    return os.fsdecode(spelled(text).encode(encoding)).replace("{folder}", str(folder))


def accepted(*_: object, **__: object) -> None:
    """In place of a run that begins."""
    pytest.fail("it was not refused")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name, content in INPUTS["files"].items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(spelled(content))
    return folder


@pytest.fixture
def folder(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(files)
    monkeypatch.setattr(loop, "attempted", accepted)
    monkeypatch.setattr(command_line, "app", COMMAND)
    return files


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def refused(argv: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Asserts that a command line ends with code 2 and one message, and leaves the folder as it was."""
    before = listing(folder)
    code, said = outcome(argv, capfd)
    assert code == USER_ERROR, said
    assert listing(folder) == before


def outcome(argv: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """The code with which a command line ends, and what it says, which can be shown and is no longer than a screen."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["srlm", *argv])
        command_line.main()
    said = "".join(capfd.readouterr())
    assert said.strip() and "Traceback" not in said and visible(said) == said
    assert len(said) <= MESSAGE_CHARACTERS + USAGE_CHARACTERS or "Commands:" in said, said
    return ended.value.code, said


def refused_by_seed(overrides: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Asserts that the stage seed of a run with these overrides ends with code 2 and one message."""
    run = Path(mkdtemp(dir=folder))
    (run / "logs").mkdir()
    (run / "config.yaml").write_text(to_yaml(load_config(Path("toy_cpu"), [f"run.dir={run}", *overrides])))
    code, said = outcome(["stage", str(run), "seed"], capfd)
    assert code == USER_ERROR and "seed.progress.json" in {path.name for path in (run / "logs").iterdir()}, said
    assert not (run / "seed").exists()
    shutil.rmtree(run)


@pytest.mark.parametrize(("override", "encoding"), entries("overrides"))
def test_override(override: str, encoding: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(["run", "toy_cpu", f"run.dir={folder}/new", word(override, encoding, folder)], folder, capfd)


@pytest.mark.parametrize(("content", "encoding"), entries("configs"))
def test_config(content: str, encoding: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "given.yaml").write_bytes(spelled(content).encode(encoding))
    refused(["run", "given.yaml"], folder, capfd)


@pytest.mark.parametrize(("words", "encoding"), entries("commands"))
def test_command(words: list[str], encoding: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused([word(one, encoding, folder) for one in words], folder, capfd)


@pytest.mark.parametrize(("name", "value", "words"), INPUTS["environments"])
def test_environment(
    name: str,
    value: str,
    words: list[str],
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, spelled(value))
    refused([word(one, "utf-8", folder) for one in words], folder, capfd)


@pytest.mark.parametrize(("content", "encoding"), entries("data"))
def test_data(content: str, encoding: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = folder / "data.jsonl"
    data.write_bytes(spelled(content).encode(encoding))
    files = [f"seed_data.path={data}", f"seed_data.ranked_path={data}"]
    refused_by_seed(["seed_data.source=jsonl", "eft.enabled=false", *files], folder, capfd)


@pytest.mark.parametrize("override", INPUTS["late"])
def test_override_of_seed(override: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = ["seed_data.num_documents=10", "seed_data.num_ift=10", "seed_data.num_eft=10"]
    generator = ["prompts.generator=file"] if override.startswith("prompts.path") else []
    refused_by_seed([*few, *generator, word(override, "utf-8", folder)], folder, capfd)


def test_there_are_enough() -> None:
    groups = ("overrides", "configs", "commands", "data")
    assert sum(len(entries(group)) for group in groups) + len(INPUTS["environments"]) >= 300
