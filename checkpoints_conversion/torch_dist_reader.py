"""Megatron's distributed checkpoints (torch_dist) read as matrices in files, however the model was split."""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from srlm_mega.checkpoints_conversion.bits import DType, dtype_named
from srlm_mega.checkpoints_conversion.huggingface_files import (
    CONFIG,
    in_one_dtype,
    read_config,
    read_json,
    special_ids,
    whole_config,
)
from srlm_mega.checkpoints_conversion.llama import Layout, check_size
from srlm_mega.checkpoints_conversion.model_place import DISTRIBUTED
from srlm_mega.checkpoints_conversion.patches import column_window, row_window
from srlm_mega.checkpoints_conversion.plain_pickle import read_metadata
from srlm_mega.checkpoints_conversion.reader import Checkpoint, Stored
from srlm_mega.checkpoints_conversion.torch_dist import KIND, METADATA, GlobalTensor, global_tensors
from srlm_mega.checkpoints_conversion.torch_save import data_begin


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the weights of a distributed checkpoint, however it was split; a training state's optimizer is passed over.
    The model's `config.json` must lie in the folder. ValueError names a tensor that is missing or of another size."""
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} is a Megatron checkpoint without {CONFIG}, which says the model's shape: copy there the one of "
            f"the Hugging Face model that it was trained from (cp MODEL/{CONFIG} {shlex.quote(str(folder))})"
        )
    config, shape = read_config(folder)
    check_format(folder)
    metadata = read_metadata(folder)
    stored: list[Stored] = []
    for tensor in global_tensors(shape):
        entry = metadata.state_dict_metadata.get(tensor.key)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{folder} has no tensor {tensor.key}: it is not a checkpoint of the Llama of its config")
        size = tuple(entry.size)
        padded = tensor.layout is Layout.VOCABULARY and size[0] >= tensor.size[0] and size[1:] == tensor.size[1:]
        if not padded:
            check_size(tensor.key, size, tensor.size, str(folder))
        dtype = dtype_named(str(entry.properties.dtype).removeprefix("torch."))
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            place = metadata.storage_data[MetadataIndex(tensor.key, offsets)]
            stored += _chunk_matrices(folder, tensor, offsets, sizes, place, dtype)
    model = whole_config(config, shape) | special_ids(folder)
    dtype, stored = in_one_dtype(stored, folder)
    return Checkpoint(folder, KIND, shape, model, dtype, tuple(stored)).check()


def check_format(folder: Path) -> None:
    """ValueError for a checkpoint of another format than torch_dist."""
    if (backend := read_json(folder / DISTRIBUTED).get("sharded_backend")) != "torch_dist":
        raise ValueError(f"{folder} is of format {backend!r}, and only torch_dist is read: save it as that")


def _chunk_matrices(
    folder: Path,
    tensor: GlobalTensor,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    place: _StorageInfo,
    dtype: DType,
) -> Iterator[Stored]:
    """Yield the layers of a chunk (Megatron saves one at a time)."""
    inner_offsets, inner_sizes = (offsets[1:], sizes[1:]) if tensor.layers else (offsets, sizes)
    row, rows = (0, 1) if tensor.is_vector else (inner_offsets[0], inner_sizes[0])
    layers = range(offsets[0], offsets[0] + sizes[0]) if tensor.layers else range(1)
    data = place.offset + _data_offset(folder / place.relative_path, place)
    for number, layer in enumerate(layers):
        matrix = row_window(tensor.matrices[layer], row, rows)
        matrix = column_window(matrix, inner_offsets[-1], inner_sizes[-1])
        skip = number * math.prod(inner_sizes) * dtype.itemsize
        name = f"{tensor.key} at {', '.join(map(str, offsets))}"
        yield Stored(name, place.relative_path, data + skip, dtype, matrix)


def _data_offset(path: Path, place: _StorageInfo) -> int:
    if not path.is_file():
        raise ValueError(f"{path} is missing, and {METADATA} names it: copy the checkpoint again")
    with path.open("rb") as file:
        file.seek(min(place.offset, path.stat().st_size))
        begin = data_begin(file.read(min(place.length, 1 << 13)))
    if begin is None:
        raise ValueError(f"{path} is truncated or damaged at byte {place.offset:,}: copy the checkpoint again")
    return begin
