"""Commands that show a run look first whether it is as it was written."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from fake_run import FakeRun
from typer.testing import CliRunner

from srlm_mega.cli.main import app
from srlm_mega.errors import UserError
from srlm_mega.run.manifest import MANIFEST
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.soundness import check_sound

COMMANDS = {
    "report": ["RUN"],
    "compare": ["RUN"],
    "evaluate lengths": ["RUN"],
    "show seed": ["RUN"],
    "show pair": ["r1-q0", "RUN"],
    "bench sampling": ["RUN"],
    "export lm_eval": ["RUN/M2"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = FakeRun(tmp_path_factory.mktemp("sound") / "toy")
    run.commit("seed", {"ift.jsonl": []}, 1.0)
    for number in (1, 2):
        run.model(number)
        run.round(number)
    return run.folder.root


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    copy: Path = shutil.copytree(whole, tmp_path / "toy")
    return copy


def altered(**fields: Any) -> Callable[[Path], None]:
    def alter(run: Path) -> None:
        path = run / "round_1/pairs" / MANIFEST
        path.write_bytes(orjson.dumps(orjson.loads(path.read_bytes()) | fields))

    return alter


def edited(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return edit


DAMAGES: dict[str, Callable[[Path], None]] = {
    "rows": altered(rows=999),
    "seconds": altered(seconds=1e9),
    "counts": altered(counts={"pairs": 1e6}),
    "version": altered(version="9"),
    "stage": altered(stage="M7"),
    "config": altered(config={}),
    "inputs": altered(inputs={"M7": "0"}),
    "layout": altered(layout={"parallel.tensor_model_parallel_size": 64}),
    "an edited figure": edited("M2/evaluation/evaluation.json", ":0.", ":0.9"),
    "another manifest's": lambda run: (
        shutil.copy(run / "round_2/pairs" / MANIFEST, run / "round_1/pairs" / MANIFEST) and None
    ),
    "the run's configuration": edited("config.yaml", "beta: ", "beta: 1"),
    "a further file": lambda run: (run / "M2/chat_template.jinja").write_text("") and None,
    "a link to nothing": lambda run: replaced(run / "round_1", lambda path: path.symlink_to(run / "gone")),
    "a linked model that is gone": lambda run: replaced(run / "M2", lambda path: path.symlink_to(run / "gone")),
    "a file for a folder": lambda run: replaced(run / "M2", lambda path: path.write_text("")),
    "no manifest": lambda run: (run / "M2" / MANIFEST).unlink(),
}
FOUND = (
    "altered|is the manifest of|is not what .* was made with|not in M2/manifest|is a link to|is a file|is there without"
)


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    shutil.rmtree(path)
    make(path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_altered_is_not_shown(run: Path, damage: str) -> None:
    check_sound(RunDir(run))
    DAMAGES[damage](run)
    with pytest.raises(UserError, match=FOUND):
        check_sound(RunDir(run))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_looks(run: Path, command: str) -> None:
    argv = [*command.split(), *(word.replace("RUN", str(run)) for word in COMMANDS[command])]
    assert "its manifest says" not in str(CliRunner().invoke(app, argv).exception)
    edited("M2/metrics.jsonl", "", "a log may change")(run)
    assert "its manifest says" not in str(CliRunner().invoke(app, argv).exception)
    damage = DAMAGES["an edited figure" if argv[0] != "export" else "a further file"]
    damage(run)
    found = CliRunner().invoke(app, argv).exception
    assert isinstance(found, UserError)
    assert re.search(
        r"evaluation\.json has 1103 bytes, its manifest says 1102|chat_template\.jinja is not in", str(found)
    )


def test_status_says_which_output_is_damaged(run: Path) -> None:
    DAMAGES["rows"](run)
    states = orjson.loads(CliRunner().invoke(app, ["status", str(run), "--json"]).output)["stages"]
    assert {one["name"] for one in states if one["state"] == "damaged"} == {"round_1/pairs"}
    assert "was altered" in next(one["note"] for one in states if one["name"] == "round_1/pairs")


@pytest.mark.parametrize(
    "damage",
    ["a further file", "a link to nothing", "a linked model that is gone", "a file for a folder", "no manifest"],
)
def test_status_of_what_is_no_output(run: Path, damage: str) -> None:
    DAMAGES[damage](run)
    done = CliRunner().invoke(app, ["status", str(run), "--json"])
    assert done.exit_code == 0, done.exception
    notes = [one["note"] for one in orjson.loads(done.output)["stages"] if one["state"] == "damaged"]
    assert notes and all(re.search(FOUND, note) for note in notes)


def test_a_run_whose_stages_were_moved_and_linked_back_is_sound(run: Path, tmp_path: Path) -> None:
    for name in ("M1", "M2/evaluation", "round_1", "round_2/pairs"):
        moved = tmp_path / "disk" / name
        moved.parent.mkdir(parents=True, exist_ok=True)
        (run / name).rename(moved)
        (run / name).symlink_to(moved)
    linked = tmp_path / "linked"
    linked.symlink_to(run)
    check_sound(RunDir(linked))
    states = orjson.loads(CliRunner().invoke(app, ["status", str(linked), "--json"]).output)["stages"]
    assert {one["state"] for one in states if one["name"].startswith(("M1", "M2", "round_1/pairs"))} >= {"done"}
    assert not [one for one in states if one["state"] == "damaged"]


def test_what_an_older_version_wrote_has_no_seal(run: Path) -> None:
    path = run / "round_1/pairs" / MANIFEST
    fields = orjson.loads(path.read_bytes())
    del fields["seal"]
    path.write_bytes(orjson.dumps(fields))
    check_sound(RunDir(run))
