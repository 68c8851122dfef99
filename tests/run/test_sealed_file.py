"""Files by which a killed attempt is resumed: used only as they were written, for the same requests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from srlm_mega.run import files
from srlm_mega.run.sealed_file import contents, fingerprint, is_whole, seal_of, write_sealed

DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_text(""),
    "cut": lambda path: path.write_text("one\n"),
    "edited": lambda path: path.write_text("one\nTwo\n"),
    "longer": lambda path: path.write_text("one\ntwo\nthree\n"),
    "gone": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "without seal": lambda path: seal_of(path).unlink(),
    "seal emptied": lambda path: seal_of(path).write_text(""),
    "another's": lambda path: write_sealed(path, lambda new: new.write_text("three\n"), "others"),
}


def make(path: Path) -> None:
    write_sealed(path, lambda new: new.write_text("one\ntwo\n"), "these")


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_it_was_written_is_made_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "drafts.jsonl"
    assert not is_whole(path, "these")
    make(path)
    assert is_whole(path, "these") and is_whole(path) and capsys.readouterr().out == ""
    assert not is_whole(path, "others") and capsys.readouterr().out
    DAMAGES[damage](path)
    assert not is_whole(path, "these")
    assert (str(path) in capsys.readouterr().out) == path.is_file()
    assert is_whole(path, "these", unsealed=True) == (damage == "without seal")


def test_a_kill_before_a_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "old")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(files, "fsync", lambda path: None if "seal" in path.name else killed())
        write_sealed(tmp_path / "old", lambda new: new.write_text("new"), "these")
    assert not is_whole(tmp_path / "old", "these"), "its seal is that of the file to come"


def killed() -> None:
    raise KeyboardInterrupt


def test_one_hash_for_requests_and_for_files(tmp_path: Path) -> None:
    assert fingerprint("a", "b") == fingerprint("a", of=["b"]) != fingerprint("ab") != fingerprint("a", of=["c"])
    (tmp_path / "a").write_text("")
    assert contents(tmp_path / "a") != contents(tmp_path / "b")
