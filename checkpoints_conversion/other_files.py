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

WEIGHTS = frozenset(
    {
        ".safetensors",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".h5",
        ".msgpack",
        ".npz",
        ".onnx",
        ".onnx_data",
        ".tflite",
        ".ot",
    }
)


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
    if "quantization_config" in read_json(folder / CONFIG):
        found.left_out.append(f"quantization_config of {CONFIG}")
    for name in _names(folder, found.left_out):
        if name in written or name in files.values() or name in (INDEX, JOURNAL):
            continue
        if unread(folder / name) is not None:
            what = "a Git LFS pointer" if (folder / name).exists() else "a link to nothing"
            found.left_out.append(f"{name} ({what})")
        elif is_weights(name):
            found.left_out.append(f"{name} (weights)")
        else:
            found.kept.append(name)
    return found


def is_weights(name: str) -> bool:
    """Tell whether a file holds weights, an optimizer's state, or the index of such files, by its name."""
    path = Path(name)
    of_model = any(word in path.name for word in ("model", "consolidated", "optimizer"))
    return path.suffix in WEIGHTS or name.endswith(".index.json") or (path.suffix == ".bin" and of_model)


def _names(folder: Path, left_out: list[str]) -> Iterator[str]:
    """Yield the paths of all files below a folder; what is not entered goes to `left_out`."""
    for place, folders, files in os.walk(folder):
        below = Path(place).relative_to(folder)
        folders.sort()
        for name in [name for name in folders if name.startswith(".") or (Path(place) / name).is_symlink()]:
            folders.remove(name)
            left_out.append(f"{below / name}/ ({'hidden' if name.startswith('.') else 'a link'})")
        yield from (str(below / name) for name in sorted(files))
