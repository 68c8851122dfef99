"""The folder of a stage's checkpoints: finding complete ones, checking their files, publishing a new one.

`megatron/iter_0000100/` holds Megatron's files and `files.json`, their sizes and hashes. It is built under a hidden
name and renamed when all of it is on disk, so a checkpoint with its own name is whole.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import orjson

from srlm_mega.errors import UserError
from srlm_mega.run.files import fsync, remove_folder, write_atomic
from srlm_mega.run.manifest import FileEntry, damage, entry_of

FILES = "files.json"
LATEST = "latest_checkpointed_iteration.txt"
PREFIX = "iter_"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimizer steps, by Megatron's name."""
    return folder / f"{PREFIX}{step:07d}"


def building_path(folder: Path, step: int) -> Path:
    """Return the hidden folder in which the checkpoint of `step` is built."""
    return folder / f".{PREFIX}{step:07d}"


def complete_steps(folder: Path) -> list[int]:
    """Return the steps of complete checkpoints, oldest first."""
    return sorted(int(path.parent.name.removeprefix(PREFIX)) for path in folder.glob(f"{PREFIX}*/{FILES}"))


def newest_step(folder: Path) -> int | None:
    """Return the newest complete checkpoint's step, or None; print which newer ones are incomplete."""
    steps = complete_steps(folder)
    for path in sorted([*folder.glob(f"{PREFIX}*"), *folder.glob(f".{PREFIX}*")]):
        step = int(path.name.removeprefix(".").removeprefix(PREFIX).partition(".")[0])
        if not (path / FILES).is_file() and step > (steps[-1] if steps else 0):
            print(f"ignoring {path}: it was not written completely", flush=True)
    return steps[-1] if steps else None


def entries_of(paths: Sequence[Path]) -> dict[str, FileEntry]:
    """Return sizes and hashes by file name."""
    return {path.name: entry_of(path) for path in paths}


def publish(folder: Path, step: int, entries: Mapping[str, FileEntry], keep: int) -> None:
    """Give a written checkpoint its list of files and its name, then remove all but the newest `keep`."""
    building, path = building_path(folder, step), checkpoint_path(folder, step)
    for name in entries:
        fsync(building / name)
    listed = {name: asdict(entry) for name, entry in sorted(entries.items())}
    write_atomic(building / FILES, orjson.dumps(listed, option=orjson.OPT_INDENT_2))
    fsync(building)
    if path.exists():  # one without a list: a complete one would have been resumed
        remove(path)
    os.rename(building, path)
    write_atomic(folder / LATEST, str(step).encode())
    fsync(folder)
    for old in complete_steps(folder)[:-keep]:
        remove(checkpoint_path(folder, old))


def remove(path: Path) -> None:
    """Remove a checkpoint; what a kill leaves of it is hidden, and removed with unfinished ones."""
    remove_folder(path, path.with_name(f".{path.name}.removed"))


def remove_unfinished(folder: Path) -> None:
    """Remove what killed attempts left."""
    for path in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(path)


def damages(path: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Return what is wrong with a complete checkpoint's files; `part` of `parts` readers checks its share of them."""
    try:
        entries = {name: FileEntry(**entry) for name, entry in orjson.loads((path / FILES).read_bytes()).items()}
    except (orjson.JSONDecodeError, TypeError, AttributeError) as error:
        return [f"{path / FILES} is not a list of files ({error})"]
    found = (damage(path / name, entries[name], FILES, FILES) for name in sorted(entries)[part::parts])
    return [text for text in found if text is not None]


def check_whole(path: Path, found: Sequence[str]) -> None:
    """Raise UserError when any reader found damage."""
    if found:
        lines = "".join(f"\n  - {text}" for text in found)
        raise UserError(
            f"the checkpoint {path} is damaged, nothing was overwritten:{lines}\n"
            f"Restore these files, or remove {path}: training then resumes from the checkpoint before it, or starts "
            "anew where there is none"
        )
