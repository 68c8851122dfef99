"""Hugging Face folders as matrices in files, and files to be written (see reader.py, build.py)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import OutputFile, Plan
from srlm_mega.checkpoints_conversion.folder import (
    CONFIG,
    INDEX,
    MAX_SHARD_BYTES,
    WEIGHTS,
    files_by_tensor,
    pretty_json,
    read_json,
    special_ids,
)
from srlm_mega.checkpoints_conversion.llama import (
    LlamaShape,
    check_names,
    check_size,
    huggingface_shapes,
    is_derived,
)
from srlm_mega.checkpoints_conversion.patches import Matrix, whole
from srlm_mega.checkpoints_conversion.reader import Checkpoint, Stored
from srlm_mega.checkpoints_conversion.safetensors_file import FileTensor, lay_out, read_header, read_scale

KIND = "huggingface"
METADATA = {"format": "pt"}
SCALES = (".weight_scale", ".input_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written: patchwork with its scale if it is FP8, or known bytes."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    content: Matrix | bytes
    scale: float | None = None


def open_checkpoint(folder: Path) -> Checkpoint:
    """A folder with `config.json` and safetensors. ValueError names the file and tensor that are wrong."""
    config = read_json(folder / CONFIG)
    shape = LlamaShape.from_huggingface(config)
    files = {
        name: file
        for name, file in files_by_tensor(folder).items()
        if not is_derived(name, shape) and not ("quantization_config" in config and name.endswith(SCALES))
    }
    check_names(files, shape, str(folder))
    headers = {file: read_header(file) for file in dict.fromkeys(files.values())}
    stored = []
    for name, size in huggingface_shapes(shape).items():
        file = files[name]
        if name not in headers[file]:
            raise ValueError(f"{file} has no tensor {name}, and {INDEX} says it has: download the folder again")
        tensor = headers[file][name]
        check_size(name, tensor.shape, size, str(file))
        scale = None
        if tensor.dtype is DType.FLOAT8_E4M3:
            scale = read_scale(file, headers[file], f"{name}_scale")
        stored.append(Stored(name, file.name, tensor.offset, tensor.dtype, whole(name, size), scale))
    return Checkpoint(
        folder, KIND, shape, shape.to_huggingface() | special_ids(folder), one_dtype(stored, folder), tuple(stored)
    ).check()


def one_dtype(stored: list[Stored], folder: Path) -> DType:
    """The dtype of all matrices that are numbers without a scale. ValueError when there are several."""
    dtypes = {item.dtype for item in stored if item.scale is None}
    if len(dtypes) != 1 or DType.FLOAT8_E4M3 in dtypes:
        found = ", ".join(sorted(dtype.torch_name for dtype in dtypes))
        raise ValueError(f"the weights in {folder} are of {found}: give a model of one of float32, float16, bfloat16")
    return dtypes.pop()


def plan(shape: LlamaShape, config: Mapping[str, Any], dtype: DType, max_shard_bytes: int = MAX_SHARD_BYTES) -> Plan:
    """A folder that transformers loads."""
    entries = [TensorEntry(name, dtype, size, whole(name, size)) for name, size in huggingface_shapes(shape).items()]
    outputs, stored, texts = safetensors_shards(entries, max_shard_bytes)
    texts[CONFIG] = pretty_json({**config, "torch_dtype": dtype.torch_name})
    return Plan(KIND, dtype, outputs, stored, texts)


def safetensors_shards(
    entries: list[TensorEntry], max_shard_bytes: int
) -> tuple[tuple[OutputFile, ...], tuple[Stored, ...], dict[str, bytes]]:
    """One `model.safetensors`, or several with their index among the texts."""
    groups = list(_shards(entries, max_shard_bytes))
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        return *safetensors_files({WEIGHTS: groups[0]}), {}
    weight_map = {entry.name: name for name, group in zip(names, groups, strict=True) for entry in group}
    total = sum(FileTensor(entry.name, entry.dtype, entry.shape).nbytes for entry in entries)
    index = pretty_json({"metadata": {"total_size": total}, "weight_map": weight_map})
    return *safetensors_files(dict(zip(names, groups, strict=True))), {INDEX: index}


def safetensors_files(files: Mapping[str, list[TensorEntry]]) -> tuple[tuple[OutputFile, ...], tuple[Stored, ...]]:
    """Files with these tensors in this order."""
    outputs, stored = [], []
    for file, entries in files.items():
        tensors = [FileTensor(entry.name, entry.dtype, entry.shape) for entry in entries]
        header, placed, size = lay_out(tensors, METADATA)
        constants = [(0, header)]
        for entry, tensor in zip(entries, placed, strict=True):
            if isinstance(entry.content, bytes):
                constants.append((tensor.offset, entry.content))
            else:
                stored.append(Stored(entry.name, file, tensor.offset, entry.dtype, entry.content, entry.scale))
        outputs.append(OutputFile(file, size, tuple(constants)))
    return tuple(outputs), tuple(stored)


def _shards(entries: list[TensorEntry], max_bytes: int) -> Iterator[list[TensorEntry]]:
    """Cut into files of at most `max_bytes` (or of one tensor)."""
    shard: list[TensorEntry] = []
    filled = 0
    for entry in entries:
        size = FileTensor(entry.name, entry.dtype, entry.shape).nbytes
        if shard and filled + size > max_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(entry)
        filled += size
    yield shard
