"""Where a command cannot write what it writes at its end, it is refused before its work."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from srlm_mega.cli.main import app
from srlm_mega.errors import USER_ERROR, UserError, exit_code, reason
from srlm_mega.run.files import check_place

COMMANDS = [
    "export alpaca_eval RUN/M1 --prompts NONE --out PLACE",
    "export mt_bench RUN/M1 --questions NONE --out PLACE",
    "evaluate head-to-head RUN/M1 NONE --out PLACE",
    "bench kernels --json PLACE",
    "bench conversion --json PLACE",
    "bench training toy_cpu --json PLACE",
    "bench device --smoke --out PLACE",
    "convert NONE PLACE --to huggingface",
    "engine build NONE PLACE",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_be_is_refused_first(command: str, tmp_path: Path) -> None:
    """Before anything else that is wrong here is said."""
    (tmp_path / "file").touch()
    place = tmp_path / "file/below/it"
    result = CliRunner().invoke(app, command.replace("PLACE", str(place)).split())
    assert isinstance(result.exception, OSError) and exit_code(result.exception) == USER_ERROR, result.output
    said = reason(result.exception)
    assert said.startswith(str(place)) and said.endswith("Not a directory: give another path")


def test_a_proof_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "converted/proof.json").mkdir(parents=True)
    (tmp_path / "converted/conversion.json").touch()
    error = (
        CliRunner().invoke(app, ["convert", "verify", str(tmp_path / "none"), str(tmp_path / "converted")]).exception
    )
    assert isinstance(error, UserError) and str(error).startswith(f"{tmp_path}/converted/proof.json is a folder")


def test_what_a_place_is_left_as(tmp_path: Path) -> None:
    """Folders are made, and nothing is changed that is there."""
    check_place(tmp_path / "a/b/file.json")
    check_place(tmp_path / "c/folder", is_folder=True)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == [Path("a"), Path("a/b"), Path("c")]
    (tmp_path / "a/file").write_text("kept")
    (tmp_path / "link").symlink_to("a/file")
    for there in (tmp_path / "a/file", tmp_path / "link", Path("/dev/null")):
        check_place(there)
    reading, writing = os.pipe()
    check_place(Path(f"/dev/fd/{writing}"))  # as /dev/stdout is before a `|`
    os.close(reading)
    os.close(writing)
    check_place(tmp_path / "a", is_folder=True)
    assert (tmp_path / "a/file").read_text() == "kept" and len(list((tmp_path / "a").iterdir())) == 2
    (tmp_path / "gone").symlink_to("unmounted/file")
    for wrong, said in (("a", "is a folder"), ("gone", "is a link to unmounted/file, which is not there")):
        with pytest.raises(UserError, match=said):
            check_place(tmp_path / wrong)
    assert not (tmp_path / "unmounted").exists()
    with pytest.raises(OSError, match="File name too long"):
        check_place(tmp_path / ("x" * (os.pathconf(tmp_path, "PC_NAME_MAX") - 1)))  # its draft has a longer one
