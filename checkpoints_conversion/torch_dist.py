"""Megatron's distributed checkpoints (torch_dist), written and read without building a model.

Such a checkpoint holds global tensors, cut into chunks: layers are the first dimension, fused matrices are the same for
every TP (queries, key and value per group; all gates, then all ups), so a model split in any way finds its parts. A
chunk is a file of torch.save within a larger file, and `.metadata` says where. (The format is that of
torch.distributed.checkpoint with the names of megatron-core's Transformer Engine layers, 0.16.1 and 0.19.2.)
"""

import io
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import orjson
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from srlm_mega.checkpoints_conversion.bits import DType, dtype_named
from srlm_mega.checkpoints_conversion.build import OutputFile, Plan
from srlm_mega.checkpoints_conversion.huggingface_files import (
    CONFIG,
    one_dtype,
    pretty_json,
    read_config,
    read_json,
    special_ids,
)
from srlm_mega.checkpoints_conversion.llama import Layout, LlamaShape, Row, check_size, table
from srlm_mega.checkpoints_conversion.megatron import placements
from srlm_mega.checkpoints_conversion.patches import (
    Matrix,
    column_part,
    column_window,
    row_part,
    row_window,
    stack,
    whole,
)
from srlm_mega.checkpoints_conversion.plain_pickle import METADATA, read_metadata
from srlm_mega.checkpoints_conversion.reader import Checkpoint, Stored

KIND = "megatron"
COMMON, FORMAT = "common.pt", "metadata.json"
FORMAT_TEXT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Norms carry the names of the fused layers of Transformer Engine, which Megatron's other layers map theirs to.
NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# Megatron's linear layers ask for a record of their own, which is empty without FP8.
EXTRA_STATES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
DATA = b"archive/data/0"  # a tensor's numbers in the archive
LAYERS, LAYER = "decoder.layers.", "decoder.layers.{layer}."


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor of the checkpoint. With `layers` its first dimension is the layer; `matrices` are per layer."""

    key: str
    layers: bool
    matrices: tuple[Matrix, ...]
    layout: Layout

    @property
    def is_vector(self) -> bool:
        """True for norms, which have one dimension."""
        return self.layout is Layout.REPLICATED

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        first = self.matrices[0]
        return self.index(len(self.matrices), first.rows, first.columns)

    def index(self, layer: int, row: int, column: int) -> tuple[int, ...]:
        """Return an offset or a size in as many dimensions as the tensor has."""
        inner = (column,) if self.is_vector else (row, column)
        return (layer, *inner) if self.layers else inner


def global_tensors(shape: LlamaShape) -> list[GlobalTensor]:
    """Return all tensors of a checkpoint of this model. A tied output has none: it is the embedding."""
    tensors = []
    for row in table(shape):
        if row.megatron == "output_layer.weight" and shape.tie_word_embeddings:
            continue
        inner = row.megatron.removeprefix(LAYER)
        layers = inner != row.megatron
        key = LAYERS + NORMS.get(inner, inner) if layers else row.megatron
        numbers = range(shape.num_layers) if layers else range(1)
        matrices = tuple(_global_matrix(row, shape, layer) for layer in numbers)
        tensors.append(GlobalTensor(key, layers, matrices, row.layout))
    return tensors


def _global_matrix(row: Row, shape: LlamaShape, layer: int) -> Matrix:
    parts = [whole(name.format(layer=layer), size) for name, size in row.huggingface.items()]
    if row.layout is not Layout.QKV:
        return stack(parts)
    groups = shape.num_query_groups
    return stack([row_part(part, group, groups) for group in range(groups) for part in parts])


@dataclass(frozen=True)
class Chunk:
    """A part of a global tensor in one file."""

    tensor: GlobalTensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    matrix: Matrix


def _rank_chunks(tensor: GlobalTensor, layer: int, tp_rank: int, tp: int) -> Iterator[Chunk]:
    """Yield what Megatron itself would save on this rank; replicas are saved by rank 0 only."""
    matrix = tensor.matrices[layer]
    parts: list[tuple[int, int, Matrix]] = []  # first row, first column, numbers
    match tensor.layout:
        case Layout.REPLICATED:
            parts = [(0, 0, matrix)] if tp_rank == 0 else []
        case Layout.ROW:
            part = column_part(matrix, tp_rank, tp)
            parts = [(0, tp_rank * part.columns, part)]
        case Layout.GATE_UP:
            halves = [(number * tp + tp_rank, row_part(matrix, number * tp + tp_rank, 2 * tp)) for number in range(2)]
            parts = [(number * half.rows, 0, half) for number, half in halves]
        case Layout.COLUMN | Layout.QKV | Layout.VOCABULARY:
            count = -(-matrix.rows // tp)
            start = tp_rank * count
            parts = [(start, 0, row_window(matrix, start, min(count, matrix.rows - start)))]
    for row, column, part in parts:
        yield Chunk(tensor, tensor.index(layer, row, column), tensor.index(1, part.rows, part.columns), part)


def plan(shape: LlamaShape, config: Mapping[str, Any], dtype: DType, tp: int, pp: int) -> Plan:
    """Plan a checkpoint cut as Megatron's ranks would cut it, a file per rank; it can be read in any other split.
    ValueError, with the arithmetic, when the model cannot be split this way."""
    tensors = global_tensors(shape)
    files: dict[str, list[Chunk]] = {}
    for number, place in enumerate(placements(shape, tp, pp)):
        chunks = files.setdefault(f"__{number}_0.distcp", [])
        for tensor in tensors:
            if tensor.layers:
                layers: tuple[int, ...] = place.layers
            elif place.first_stage if tensor.key.startswith("embedding") else place.last_stage:
                layers = (0,)
            else:
                layers = ()
            for layer in layers:
                chunks += _rank_chunks(tensor, layer, place.tp_rank, tp)
    outputs, stored, metadata = _place(files, dtype, tensors, shape)
    texts = {
        COMMON: _torch_bytes({}),
        CONFIG: pretty_json({**config, "torch_dtype": dtype.torch_name}),
        METADATA: pickle.dumps(metadata),
        FORMAT: orjson.dumps(FORMAT_TEXT),
    }
    return Plan(KIND, dtype, outputs, stored, texts)


def _place(
    files: Mapping[str, list[Chunk]], dtype: DType, tensors: list[GlobalTensor], shape: LlamaShape
) -> tuple[tuple[OutputFile, ...], tuple[Stored, ...], Metadata]:
    outputs: list[OutputFile] = []
    stored: list[Stored] = []
    storage: dict[MetadataIndex, _StorageInfo] = {}
    torch_dtype = getattr(torch, dtype.torch_name)
    entries: dict[str, Any] = {
        tensor.key: TensorStorageMetadata(TensorProperties(dtype=torch_dtype), torch.Size(tensor.size), [])
        for tensor in tensors
    }
    for file, chunks in files.items():
        position = 0
        constants: list[tuple[int, bytes]] = []
        for chunk in chunks:
            around, begin, size = _envelope(chunk.sizes, torch_dtype)
            constants += [(position + offset, content) for offset, content in around]
            place = ", ".join(map(str, chunk.offsets))
            stored.append(Stored(f"{chunk.tensor.key} at {place}", file, position + begin, dtype, chunk.matrix))
            entry = entries[chunk.tensor.key]
            # The index's last number is only a hint for readers, and no part of its identity.
            storage[MetadataIndex(chunk.tensor.key, chunk.offsets, len(entry.chunks))] = _StorageInfo(
                file, position, size
            )
            entry.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
            position += size
        if not outputs:  # one record in the first file serves as every layer's empty extra state
            empty = _torch_bytes([None])
            constants.append((position, empty))
            for layer, module in product(range(shape.num_layers), EXTRA_STATES):
                key = f"{LAYERS}{module}._extra_state/shard_{layer}_{shape.num_layers}"
                entries[key] = BytesStorageMetadata()
                storage[MetadataIndex(key)] = _StorageInfo(file, position, len(empty))
            position += len(empty)
        outputs.append(OutputFile(file, position, tuple(constants)))
    return tuple(outputs), tuple(stored), Metadata(entries, storage_data=storage, version="1.0.0")


class _Sink:
    """A file that keeps what is written into it, apart from large pieces: those are the numbers."""

    LARGE = 1 << 16

    def __init__(self) -> None:
        self.pieces: dict[int, bytes] = {}  # by their offset
        self.size = self._start = 0  # of the file so far, and of the piece that is being written

    def write(self, content: memoryview) -> int:
        """Take the next bytes, as a file does."""
        self.size += len(content)
        if len(content) < self.LARGE:
            self.pieces[self._start] = self.pieces.get(self._start, b"") + bytes(content)
        else:
            self._start = self.size
        return len(content)

    def flush(self) -> None:
        """Do nothing: torch.save wants the method."""


@cache
def _envelope(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[list[tuple[int, bytes]], int, int]:
    """Return what torch.save writes around the numbers of a tensor, as (offset, bytes), the offset of the numbers, and
    the size of all. It depends on size and dtype only, apart from a checksum that torch.load does not read."""
    sink = _Sink()
    torch.save(torch.zeros(sizes, dtype=dtype), sink)  # zeros that nobody writes take no memory
    begin = _data_begin(sink.pieces[0])
    assert begin is not None, "torch.save writes another zip"
    return list(sink.pieces.items()), begin, sink.size


def _data_begin(archive: bytes) -> int | None:
    """Find a tensor's numbers in the zip archive of torch.save, by the local header: 30 bytes, name, extra field. None
    where it is another archive."""
    header = archive.find(DATA) - 30
    name_length, extra_length = (int.from_bytes(archive[header + at : header + at + 2], "little") for at in (26, 28))
    if header < 0 or archive[header : header + 4] != b"PK\x03\x04" or name_length != len(DATA):
        return None
    return header + 30 + name_length + extra_length


def _torch_bytes(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the weights of a distributed checkpoint, however it was split; a training state's optimizer is passed over.
    The model's `config.json` must lie in the folder. ValueError names a tensor that is missing or of another size."""
    _, shape = read_config(folder)
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
    model = shape.to_huggingface() | special_ids(folder)
    return Checkpoint(folder, KIND, shape, model, one_dtype(stored, folder), tuple(stored)).check()


def check_format(folder: Path) -> None:
    """ValueError for a checkpoint of another format than torch_dist."""
    if (backend := read_json(folder / FORMAT).get("sharded_backend")) != "torch_dist":
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
        begin = _data_begin(file.read(min(place.length, 1 << 13)))
    if begin is None:
        raise ValueError(f"{path} is truncated or damaged at byte {place.offset:,}: copy the checkpoint again")
    return begin
