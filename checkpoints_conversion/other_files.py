"""What a Hugging Face folder has beside the model: files that go along, and what is left out."""

import os
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from srlm_mega.checkpoints_conversion.build import JOURNAL
from srlm_mega.checkpoints_conversion.huggingface_files import CONFIG, INDEX, files_of_tensors, read_json
from srlm_mega.checkpoints_conversion.llama import huggingface_shapes
from srlm_mega.checkpoints_conversion.model_place import unread
from srlm_mega.checkpoints_conversion.reader import Checkpoint

WEIGHTS = (
    *(".safetensors", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".onnx", ".onnx_data"),
    *(".tflite", ".mlmodel", ".ot", ".nemo", ".distcp", ".engine"),
)
MAYBE_WEIGHTS = (".bin", ".pkl", ".npy", ".pb", ".tar", ".zip")  # of a model, by their names
UNFINISHED = (".part", ".partial", ".incomplete", ".tmp")  # of a download


@dataclass(frozen=True)
class OtherFiles:
    """Paths below a folder: of files that are not weights, and, in words, what a conversion leaves out."""

    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def other_files(checkpoint: Checkpoint, written: Container[str]) -> OtherFiles:
    """Sort what a Hugging Face folder holds beside the tensors of its model. `written`: names that the conversion makes
    itself."""
    found, folder = OtherFiles(), checkpoint.folder
    files = files_of_tensors(folder)
    unused = sorted(files.keys() - huggingface_shapes(checkpoint.shape).keys())
    if unused:
        found.left_out.append(f"{len(unused)} unused tensors ({', '.join(unused[:3])}{', ...' * (len(unused) > 3)})")
    if read_json(folder / CONFIG).get("quantization_config") is not None:
        found.left_out.append(f"quantization_config of {CONFIG}")
    for name in _names(folder, found.left_out):
        if name in written or name in files.values() or name in (INDEX, JOURNAL):
            continue
        if unread(folder / name) is not None:
            what = "a Git LFS pointer" if (folder / name).exists() else "a link to nothing"
            found.left_out.append(f"{name} ({what})")
        elif not (folder / name).is_file() or not os.access(folder / name, os.R_OK):
            found.left_out.append(f"{name} (not readable)")
        elif is_weights(name):
            found.left_out.append(f"{name} (weights)")
        else:
            found.kept.append(name)
    return found


def is_weights(name: str) -> bool:
    """Tell whether a file holds weights, an optimizer's state, or the index of such files, by its name."""
    path = Path(name.lower())
    if path.suffix in UNFINISHED or path.suffix == ".data":  # onnx's weights are in model.onnx.data
        path = path.with_suffix("")
    of_model = any(word in path.name for word in ("model", "weight", "consolidated", "optimizer"))
    return path.suffix in WEIGHTS or path.name.endswith(".index.json") or (path.suffix in MAYBE_WEIGHTS and of_model)


def _names(folder: Path, left_out: list[str]) -> Iterator[str]:
    """Yield the paths of all files below a folder; what is not entered goes to `left_out`."""
    for place, folders, files in os.walk(folder):
        below = Path(place).relative_to(folder)
        folders.sort()
        for name in [name for name in folders if name.startswith(".") or (Path(place) / name).is_symlink()]:
            folders.remove(name)
            left_out.append(f"{below / name}/ ({'hidden' if name.startswith('.') else 'a link'})")
        yield from (str(below / name) for name in sorted(files))
