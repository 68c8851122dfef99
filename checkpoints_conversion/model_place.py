"""Where a path's model is, and why there is none: links to nothing, the hub's cache, Megatron's folders, Git LFS."""

import os
import shlex
from pathlib import Path

CONFIG_NAME = "config.json"
DISTRIBUTED = "metadata.json"  # what makes a folder one of Megatron's distributed checkpoints
TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"  # Megatron-LM's: the newest checkpoint, and a model
POINTER = b"version https://git-lfs"  # how the text begins that Git leaves in place of a large file
LEGACY = "mp_rank_"
FILES_OF_FOLDERS = frozenset({".safetensors", ".json", ".bin", ".pt", ".pth", ".distcp", ".model"})


def located(path: Path) -> Path:
    """Return the folder of a checkpoint, or the file, that a path leads to. ValueError, with the way out, where there
    is none."""
    place = followed(path)
    if (reason := unweighted(place)) is not None:
        raise ValueError(reason)
    if place.is_file() or (place / DISTRIBUTED).is_file() or (place / CONFIG_NAME).is_file():
        if (reason := unread_part(place)) is not None:
            raise ValueError(reason)
        return place
    raise ValueError(
        obstacle(path)
        or f"{path} is no checkpoint: it has neither {CONFIG_NAME} (Hugging Face, TensorRT-LLM) nor {DISTRIBUTED} "
        "(Megatron): give a folder that has one, or a GGUF file"
    )


def unweighted(path: Path) -> str | None:
    """Return why a path that looks like a model holds none that is read: a file of a folder, or a folder of Megatron's
    with a config.json that was put there. None for others."""
    if path.is_file() and path.suffix in FILES_OF_FOLDERS and unread(path) is None:
        of_legacy = path.parent.name.startswith(LEGACY)
        remedy = f"{path} is not a GGUF file, but one of a model's folder: give the folder, {path.parent}"
        return _of_megatron(path.parent) if of_legacy else remedy
    if (path / DISTRIBUTED).is_file() or not (path / CONFIG_NAME).is_file() or any(path.glob("*.safetensors*")):
        return None
    return _of_megatron(path)


def followed(path: Path) -> Path:
    """Return the checkpoint that the tracker of Megatron's parent folder names; any other path as it is."""
    inner = path / (tracked(path) or "")
    return inner if (inner / DISTRIBUTED).is_file() else path


def tracked(path: Path) -> str | None:
    """Return the folder that the tracker of Megatron's parent folder names as its newest checkpoint; None where there
    is no tracker, or it names none: it holds a number or `release`."""
    word = _tracker_word(path)
    if word is None or word == RELEASE:
        return word
    return f"iter_{int(word):07d}" if word.isdecimal() else None


def _tracker_word(path: Path) -> str | None:
    tracker = path / TRACKER
    if not tracker.is_file():
        return None
    with tracker.open("rb") as content:
        return content.read(64).decode("ascii", errors="replace").strip()


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
    weights = sorted(one for kind in ("*.safetensors", "*.distcp", ".metadata") for one in path.glob(kind)) or sorted(
        path.glob("*.bin")
    )
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
    within = path.parent.parent if path.parent.name == "snapshots" else path
    within = within.parent if within.name in ("snapshots", "blobs", "refs") else within
    below = (one for root in ("", "hub/", "huggingface/hub/") for one in sorted(within.glob(f"{root}models--*")))
    models = [within, *below] if path == within or within.name.startswith("models--") else []
    places = [found[0] for model in models if (found := _best_first(model))]
    if places:
        more = f" (or another model, such as {places[1]})" if len(places) > 1 else ""
        return f"{path} is of the hub's cache, whose models are in snapshots/HASH: give {places[0]}{more}"
    named = next((model.name for model in models if model.name.startswith("models--")), None)
    if named is not None:
        name = named.removeprefix("models--").replace("--", "/")
        return f"{path} is of the hub's cache, without a snapshot of a whole model: hf download {shlex.quote(name)}"
    return None


def _of_megatron(path: Path) -> str | None:
    name, word = tracked(path), _tracker_word(path)
    inner = None if name is None else path / name
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
    if not iterations and (any((path / RELEASE).glob(f"{LEGACY}*")) or (path / RELEASE / DISTRIBUTED).is_file()):
        iterations = [path / RELEASE]
    if name is None and iterations and any(iterations[0].glob(f"{LEGACY}*")):
        return _of_megatron(iterations[0])
    there = f": give one of those there, such as {iterations[0]}" if iterations else ": copy it again"
    if inner is not None:
        return f"{path / TRACKER} names {inner}, which does not exist{there}"
    if word is not None:
        return unread(path / TRACKER) or (
            f"{path / TRACKER} says {word!r}, and should say a number of iterations or {RELEASE}{there}"
        )
    return f"{path} is a folder of Megatron's checkpoints without {TRACKER}{there}" if iterations else None


def _best_first(model: Path) -> list[Path]:
    """Return where the snapshots of a model of the hub's cache are models, folders and GGUF files: the one that `main`
    is first, then the newest."""
    main = model / "refs/main"
    wanted = main.read_bytes().decode(errors="replace").strip() if main.is_file() else ""
    ordered = sorted((model / "snapshots").glob("*/"), key=lambda one: (one.name != wanted, -one.stat().st_mtime))
    folders = [one for one in ordered if (one / CONFIG_NAME).is_file()]
    return folders or [file for one in ordered for file in sorted(one.glob("*.gguf"))]
