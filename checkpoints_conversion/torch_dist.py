"""Megatron's distributed checkpoints (torch_dist), written without building a model, and without torch.

Such a checkpoint holds global tensors, cut into chunks: layers are the first dimension, fused matrices are the same for
every TP (queries, key and value per group; all gates, then all ups), so a model split in any way finds its parts. A
chunk is a file of torch.save within a larger file, and `.metadata` says where. (The format is that of
torch.distributed.checkpoint with the names of megatron-core's Transformer Engine layers, 0.16.1 and 0.19.2.) It is in
a folder `release` beside the file that names it, which is where Megatron-LM's `--load` looks.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import orjson

from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import OutputFile, Plan
from srlm_mega.checkpoints_conversion.huggingface_files import CONFIG, pretty_json, typed_config
from srlm_mega.checkpoints_conversion.llama import Layout, LlamaShape, Row, table
from srlm_mega.checkpoints_conversion.model_place import DISTRIBUTED, RELEASE, TRACKER
from srlm_mega.checkpoints_conversion.patches import Matrix, column_part, row_part, row_window, stack, whole
from srlm_mega.checkpoints_conversion.placement import placements
from srlm_mega.checkpoints_conversion.reader import Stored
from srlm_mega.checkpoints_conversion.torch_save import Call, Global, SavedFile, Storage, data_begin, pickled

KIND = "megatron"
COMMON, METADATA = "common.pt", ".metadata"
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
# What Megatron-LM's own code asks for beside the weights; 3.0 is the order of queries, keys and values since 2020.
COMMON_STATE = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": dict[str, object]()}
STORAGES = {DType.FLOAT32: "FloatStorage", DType.FLOAT16: "HalfStorage", DType.BFLOAT16: "BFloat16Storage"}
PLACES = "torch.distributed.checkpoint.metadata"
ORDERED_DICT, REBUILD = Global("collections", "OrderedDict"), Global("torch._utils", "_rebuild_tensor_v2")
INDEX, STORAGE_INFO = Global(PLACES, "MetadataIndex"), Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
CHUNK, TENSOR = Global(PLACES, "ChunkStorageMetadata"), Global(PLACES, "TensorStorageMetadata")
BYTES, PROPERTIES = Global(PLACES, "BytesStorageMetadata"), Global(PLACES, "TensorProperties")
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
        COMMON: SavedFile(COMMON_STATE).pieces[0],
        CONFIG: pretty_json(typed_config(config, dtype)),
        METADATA: pickled(metadata),
        DISTRIBUTED: orjson.dumps(FORMAT_TEXT),
    }
    inside = {f"{RELEASE}/{name}": content for name, content in texts.items()}
    return Plan(KIND, dtype, outputs, stored, inside | {TRACKER: RELEASE.encode()}, folder=Path(RELEASE))


def _place(
    files: Mapping[str, list[Chunk]], dtype: DType, tensors: list[GlobalTensor], shape: LlamaShape
) -> tuple[tuple[OutputFile, ...], tuple[Stored, ...], Call]:
    outputs: list[OutputFile] = []
    stored: list[Stored] = []
    storage: dict[Call, Call] = {}
    properties = Call(PROPERTIES, (Global("torch", dtype.torch_name),))
    chunks_of: dict[str, list[Call]] = {tensor.key: [] for tensor in tensors}
    entries = {tensor.key: Call(TENSOR, (properties, _size(tensor.size), chunks_of[tensor.key])) for tensor in tensors}
    for file, chunks in files.items():
        position, path = 0, f"{RELEASE}/{file}"
        constants: list[tuple[int, bytes]] = []
        for chunk in chunks:
            around, begin, size = _envelope(chunk.sizes, dtype)
            constants += [(position + offset, content) for offset, content in around]
            key, place = chunk.tensor.key, ", ".join(map(str, chunk.offsets))
            stored.append(Stored(f"{key} at {place}", path, position + begin, dtype, chunk.matrix))
            # The index's last number is only a hint for readers, and no part of its identity.
            index = Call(INDEX, (key, chunk.offsets, len(chunks_of[key])))
            storage[index] = Call(STORAGE_INFO, (file, position, size))
            chunks_of[key].append(Call(CHUNK, (_size(chunk.offsets), _size(chunk.sizes))))
            position += size
        if not outputs:  # one record in the first file serves as every layer's empty extra state
            empty = SavedFile([None]).pieces[0]
            constants.append((position, empty))
            for layer, module in product(range(shape.num_layers), EXTRA_STATES):
                key = f"{LAYERS}{module}._extra_state/shard_{layer}_{shape.num_layers}"
                entries[key] = Call(BYTES, ())
                storage[Call(INDEX, (key,))] = Call(STORAGE_INFO, (file, position, len(empty)))
            position += len(empty)
        outputs.append(OutputFile(path, position, tuple(constants)))
    return tuple(outputs), tuple(stored), Call(Global(PLACES, "Metadata"), (entries, None, storage))


def _size(numbers: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (numbers,))


@cache
def _envelope(sizes: tuple[int, ...], dtype: DType) -> tuple[list[tuple[int, bytes]], int, int]:
    """Return what torch.save writes around the numbers of a contiguous tensor, as (offset, bytes), the offset of the
    numbers, and the size of all."""
    count = math.prod(sizes)
    strides = tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
    storage = Storage(("storage", Global("torch", STORAGES[dtype]), "0", "cpu", count))
    tensor = Call(REBUILD, (storage, 0, sizes, strides, False, Call(ORDERED_DICT, ())))
    file = SavedFile(tensor, count * dtype.itemsize)
    begin = data_begin(file.pieces[0])
    assert begin is not None, "the numbers of a tensor have no place"
    return list(file.pieces.items()), begin, file.size
