"""Which checkpoints are complete, which are damaged, and what is kept. Files only: Megatron's are in test_resume.py."""

from pathlib import Path

import pytest

from srlm_mega.errors import UserError
from srlm_mega.training.checkpoint_files import (
    FILES,
    building_path,
    check_whole,
    checkpoint_path,
    complete_steps,
    damages,
    entries_of,
    newest_step,
    publish,
    remove_unfinished,
)


def write(folder: Path, step: int, keep: int = 2, text: str = "weights") -> Path:
    """A checkpoint of two files."""
    building = building_path(folder, step)
    building.mkdir(parents=True)
    (building / "__0_0.distcp").write_text(text)
    (building / ".metadata").write_text("places")
    publish(folder, step, entries_of(list(building.iterdir())), keep)
    return checkpoint_path(folder, step)


def test_names_are_megatrons(tmp_path: Path) -> None:
    path = write(tmp_path, 100)
    assert path.name == "iter_0000100" and path.is_dir()
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "100"
    assert damages(path) == []


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 10, 8):
        write(tmp_path, step)
    assert complete_steps(tmp_path) == [8, 10], "steps count, not the order of writing"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000008",
        "iter_0000010",
        "latest_checkpointed_iteration.txt",
    ]


def test_what_was_not_written_to_its_end_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert newest_step(tmp_path) is None
    write(tmp_path, 2)
    building_path(tmp_path, 4).mkdir()
    (write(tmp_path, 6) / FILES).unlink()
    assert newest_step(tmp_path) == 2
    said = capsys.readouterr().out
    assert "iter_0000004: it was not written" in said and "iter_0000006: it was not written" in said
    remove_unfinished(tmp_path)
    assert not building_path(tmp_path, 4).exists()
    write(tmp_path, 6)
    assert newest_step(tmp_path) == 6 and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("damage", "said"),
    [("truncate", "has 6 bytes, files.json says 7"), ("alter", "was altered: its xxh3-128"), ("remove", "is missing")],
)
def test_damage_is_named(tmp_path: Path, damage: str, said: str) -> None:
    path = write(tmp_path, 2)
    shard = path / "__0_0.distcp"
    match damage:
        case "truncate":
            shard.write_text("weight")
        case "alter":
            shard.write_text("weighty")
        case _:
            shard.unlink()
    found = damages(path)
    assert len(found) == 1 and said in found[0] and str(shard) in found[0]
    with pytest.raises(UserError, match=r"is damaged, nothing was overwritten:\n  - ") as error:
        check_whole(path, found)
    assert f"or remove {path}" in str(error.value)


def test_readers_share_the_work(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    for file in (".metadata", "__0_0.distcp"):
        (path / file).unlink()
    parts = [damages(path, part, 3) for part in range(3)]
    assert [len(found) for found in parts] == [1, 1, 0]
    assert sorted(parts[0] + parts[1]) == sorted(damages(path))


def test_a_broken_list_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    (path / FILES).write_text("{")
    assert "is not a list of files" in damages(path)[0]
