"""Where a path's model is, and why there is none: links to nothing, the hub's cache, Megatron's folders, Git LFS."""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

CONFIG_NAME = "config.json"
DISTRIBUTED = "metadata.json"  # what makes a folder one of Megatron's distributed checkpoints
TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"  # Megatron-LM's: the newest checkpoint, and a model
POINTER = b"version https://git-lfs"  # how the text begins that Git leaves in place of a large file
LEGACY = "mp_rank_"


def located(path: Path) -> Path:
    """Return the folder of a checkpoint, or the file, that a path leads to. ValueError, with the way out, where there
    is none."""
    place = followed(path)
    if place.is_file() or (place / DISTRIBUTED).is_file() or (place / CONFIG_NAME).is_file():
        if (reason := unread_part(place)) is not None:
            raise ValueError(reason)
        return place
    raise ValueError(
        obstacle(path)
        or f"{path} is no checkpoint: it has neither {CONFIG_NAME} (Hugging Face, TensorRT-LLM) nor {DISTRIBUTED} "
        "(Megatron): give a folder that has one, or a GGUF file"
    )


def followed(path: Path) -> Path:
    """Return the checkpoint that the tracker of Megatron's parent folder names; any other path as it is."""
    inner = tracked(path)
    return inner if inner is not None and (inner / DISTRIBUTED).is_file() else path


def tracked(path: Path) -> Path | None:
    """Return the checkpoint that Megatron's parent folder names as its newest; None where a path is no such folder."""
    tracker = path / TRACKER
    if not tracker.is_file():
        return None
    with tracker.open("rb") as content:
        word = content.read(64).decode(errors="replace").strip()
    return path / (RELEASE if word == RELEASE else Path(f"iter_{word:0>7}").name)


def unread(file: Path) -> str | None:
    """Return why a file cannot be read as what its name says: a link to nothing, or a Git LFS pointer. None for others,
    and where there is none."""
    if (end := broken_link(file)) is not None:
        return end
    if not file.is_file():
        return None
    with file.open("rb") as content:
        if content.read(len(POINTER)) != POINTER:
            return None
    command = f"git -C {shlex.quote(str(file.parent))} lfs pull"
    return f"{file} is a Git LFS pointer, and not the file it stands for: run `{command}`, or download the model again"


def unread_part(path: Path) -> str | None:
    """Return why a model's folder, or file, is not whole: the first file of its texts and weights that is `unread`."""
    weights = sorted((*path.glob("*.safetensors"), *path.glob("*.distcp"))) or sorted(path.glob("*.bin"))
    texts = (file for pattern in ("*.json", "*.model", "*.jinja") for file in sorted(path.glob(pattern)))
    return next((reason for file in (path, *texts, *weights) if (reason := unread(file)) is not None), None)


def broken_link(path: Path) -> str | None:
    """Return which link on the way to a path leads to nothing; None where none does."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            return (
                f"{place} is not there: it is a link to {os.readlink(place)}, which does not exist. Bring that back, "
                "or copy (`cp -rL` copies what links lead to) or download the model again"
            )
    return None


def obstacle(path: Path) -> str | None:
    """Return why there is no model at a path, and the way out, where it is a known kind of folder without one."""
    return unread(path / CONFIG_NAME) or _of_hub_cache(path) or _of_megatron(path)


def _of_hub_cache(path: Path) -> str | None:
    within = path.parent if path.name in ("snapshots", "blobs", "refs") else path
    models = [within, *sorted(within.glob("models--*")), *sorted(within.glob("hub/models--*"))]
    snapshots = [one for model in models for one in _best_first((model / "snapshots").glob("*/"))]
    if snapshots:
        return f"{path} is of the hub's cache, whose models are in snapshots/HASH: give {snapshots[0]}"
    if within.name.startswith("models--"):
        name = within.name.removeprefix("models--").replace("--", "/")
        return f"{path} is of the hub's cache, without a snapshot: download the model (hf download {shlex.quote(name)})"
    return None


def _of_megatron(path: Path) -> str | None:
    inner = tracked(path)
    if inner is not None and inner.is_dir():
        return _of_megatron(inner) or f"{path / TRACKER} names {inner}, which is no checkpoint: give another one"
    if path.name.startswith(LEGACY) or any(path.glob(f"{LEGACY}*")):
        return (
            f"{path} is a checkpoint of Megatron-LM's legacy format ({LEGACY}*), which is not read. Megatron-LM makes "
            "a distributed one of it: start its script with the options of that training and --ckpt-format torch "
            "--load FOLDER --ckpt-convert-format torch_dist --ckpt-convert-save NEW, and give NEW/torch_dist"
        )
    if (path / DISTRIBUTED).is_file():
        new = f"srlm convert {shlex.quote(str(path))} FOLDER --to huggingface"
        return f"{path} is a Megatron checkpoint and not a Hugging Face folder: make one of it ({new}) and give that"
    if any(path.glob("*.distcp")) or (path / ".metadata").is_file():
        return (
            f"{path} is a distributed checkpoint without {DISTRIBUTED}: it was not finished, or is of another "
            "format than Megatron's torch_dist (torch_dcp, fsdp_dtensor): give one saved with --ckpt-format torch_dist"
        )
    iterations = sorted((one for one in path.glob("iter_*/") if one.is_dir()), reverse=True)
    there = f": give one of those there, such as {iterations[0]}" if iterations else ": copy it again"
    if inner is not None:
        return f"{path / TRACKER} names {inner}, which does not exist{there}"
    return f"{path} is a folder of Megatron's checkpoints without {TRACKER}{there}" if iterations else None


def _best_first(folders: Iterable[Path]) -> list[Path]:
    """Return the folders with a config.json first, and of these the newest first."""
    return sorted(folders, key=lambda folder: (not (folder / CONFIG_NAME).exists(), -folder.stat().st_mtime))
