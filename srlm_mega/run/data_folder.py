"""Which files of a folder are a user's data: those of the training set, by their names and by what lies beside them."""

import re
from collections.abc import Collection
from pathlib import Path

from srlm_mega.checkpoints_conversion import json_files
from srlm_mega.errors import UserError

JSON_NAMES = (".json", ".jsonl", ".ndjson", ".jsonlines")
TABLE_NAMES = (".parquet", ".arrow")
OTHER_NAMES = (".txt", ".csv", ".tsv")  # read in a folder that has none of the others
DESCRIBING = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
TRAIN = "train"
SPLITS = dict.fromkeys(("train", "training"), TRAIN)
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
NAMED = 5  # files in a message


def data_files(path: Path) -> list[Path]:
    """Return the file at a path, or the data files of a folder, sorted: those of the split `train` where it has several
    splits. UserError when there is none, or when it has several splits and none is `train`."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no file {path}")
    splits = splits_in(path)
    if not splits:
        others = unread_files(path, set())
        raise UserError(
            f"{path} is no file, and a folder without data files ({', '.join(JSON_NAMES + TABLE_NAMES)})"
            + (f": it has {others}" if others else "")
        )
    if len(splits) > 1 and TRAIN not in splits:
        named = ", ".join(split or files[0].name for split, files in splits.items())
        raise UserError(f"{path} has several splits ({named}), and none is `train`: give the file or folder of one")
    return splits[TRAIN] if len(splits) > 1 else next(iter(splits.values()))


def splits_in(folder: Path) -> dict[str, list[Path]]:
    """Return a folder's data files, sorted, by split; without what is hidden and what only describes a data set.
    UserError when one that a `state.json` lists is not there."""
    shown = shown_files(folder)
    saved = {file.parent: saved_files(file) for file in shown if file.name == "state.json"}
    for file in (parent / name for parent, names in saved.items() for name in names):
        if not file.is_file():
            raise UserError(f"there is no file {file}, which the state.json beside it lists: copy the folder whole")
    listed = [file for file in shown if file.name in (saved.get(file.parent) or [file.name])]
    data = [file for file in listed if plain_suffix(file) in JSON_NAMES + TABLE_NAMES and file.name not in DESCRIBING]
    splits: dict[str, list[Path]] = {}
    for file in data or [file for file in listed if plain_suffix(file) in OTHER_NAMES]:
        splits.setdefault(split_of(folder, file), []).append(file)
    return splits


def shown_files(folder: Path) -> list[Path]:
    """Return all files in a folder, sorted, without what is hidden."""
    every = sorted(file for file in folder.rglob("*") if file.is_file())
    return [file for file in every if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def unread_files(folder: Path, read: Collection[Path]) -> str:
    """Return the names of a folder's files that are not read and may be data, some of them where there are many."""
    passed = (*JSON_NAMES, *TABLE_NAMES, ".md")  # those of a cache, those that describe
    names = [file.name for file in shown_files(folder) if file not in read and plain_suffix(file) not in passed]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def saved_files(state: Path) -> list[str]:
    """Return the names that Hugging Face's `state.json` lists: files of a cache and of earlier versions lie beside.
    None for another program's file of that name."""
    try:
        listed = json_files.parse_object(state.read_bytes(), state).get("_data_files", [])
        return [str(one["filename"]) for one in listed]
    except (ValueError, TypeError, KeyError):
        return []


def plain_suffix(file: Path) -> str:
    """Return a file's suffix in lower case, that of gzip left out."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def split_of(folder: Path, file: Path) -> str:
    """Return the split of a file in a folder, which its name says (`train-00000-of-00002`, `my_test.jsonl`), or that of
    a folder which it is in; empty for none."""
    *folders, name = file.relative_to(folder).parts
    if folders and (folder / "dataset_dict.json").is_file():
        return folders[0]
    for one in (name.partition(".")[0], *reversed(folders)):
        stem, is_shard = re.subn(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?$", "", one)
        if is_shard and stem != "data":
            return stem.rpartition("-")[2]
        for word in re.split(r"[\W_\d]+", one.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return ""
