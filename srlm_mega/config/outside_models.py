"""Model folders that a configuration names: by their path, or by the id of a model in the local hub cache."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from srlm_mega.checkpoints_conversion.model_place import obstacle, unread
from srlm_mega.text import quoted

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local_folder(path: Path) -> Path:
    """Return a model's folder: the path or, where there is none and it has the form org/name, the snapshot of this
    model in the local hub cache, without asking the network. The path itself where there is neither."""
    is_id = HUB_ID.fullmatch(str(path)) is not None
    if path.exists() or not is_id or not (hub_cache() / f"models--{str(path).replace('/', '--')}").is_dir():
        return path
    # It takes longer to import than all the rest of a configuration.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except LocalEntryNotFoundError:  # the download was broken off, or was of another revision
        return path


def hub_cache() -> Path:
    """Return the folder of the local hub cache."""
    from huggingface_hub import constants  # which the sampler's environment need not have: models are folders there

    return Path(constants.HF_HUB_CACHE)


def absence(path: Path) -> str:
    """Say why there is no model at a path, and how to get one: out of a GGUF file or, where the path may be an id, into
    the hub cache."""
    if path.is_file():
        converted = f"make a folder of it (srlm convert {quoted(path)} FOLDER --to huggingface) and give that"
        return f"{path} is a file: {converted if path.suffix == '.gguf' else 'give its folder'}"
    if (reason := obstacle(path)) is not None:
        return reason
    if path.exists():
        return f"{path} has no config.json"
    if HUB_ID.fullmatch(str(path)) is None:
        return f"there is no {path}"
    download = f"hf download {quoted(path)}"
    return f"there is no {path}, nor a whole model of this id in the hub cache {hub_cache()} ({download})"


def shape_in(folder: Path) -> dict[str, Any]:
    """Return the shape of the model in a folder, as keys of the model section; nothing where it has no config.json.
    ValueError, which names the file, for anything but a plain Llama."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    if (reason := unread(file)) is not None:
        raise ValueError(reason)
    # It loads numpy, which no configuration without a folder needs.
    from srlm_mega.checkpoints_conversion.huggingface_files import read_config

    return asdict(read_config(folder)[1])


def indexed_files(folder: Path) -> set[str]:
    """Return the names of the files of weights that a folder's index lists; none where it has no index. ValueError for
    an index that is damaged, or names a file outside of the folder."""
    from srlm_mega.checkpoints_conversion.huggingface_files import INDEX, read_index

    return set(read_index(folder / INDEX).values()) if (folder / INDEX).is_file() else set()


def other_shape(folder: Path) -> str | None:
    """Return why the headers of a Llama's weights are not those of its config.json; None for sound ones, for models
    that only engines know, and for quantized ones."""
    if not (folder / "config.json").is_file():
        return None
    from srlm_mega.checkpoints_conversion.huggingface_files import read_json, stored_tensors
    from srlm_mega.checkpoints_conversion.llama import LlamaShape

    try:
        config = read_json(folder / "config.json")
    except ValueError as error:
        return str(error)
    try:
        shape = None if "quantization_config" in config else LlamaShape.from_huggingface(config)
    except ValueError:
        return None
    try:
        if shape is not None:
            stored_tensors(folder, shape)
    except ValueError as error:
        return str(error)
    return None
