"""Pickles from outside, read as data: of what one asks for by name only a closed set is made, and nothing else runs."""

import io
import pickle
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import metadata as older
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from srlm_mega.checkpoints_conversion.torch_dist import METADATA

DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
CLASSES = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    older.MEM_FORMAT_ENCODING,  # of torch before 2.3
    older.TensorProperties,
    filesystem._StorageInfo,
    # The plans of the ranks, which Megatron keeps beside the metadata where it uses them again.
    planner.BytesIOWriteData,
    planner.SavePlan,
    planner.TensorWriteData,
    planner.WriteItem,
    planner.WriteItemType,
)
METADATA_NAMES = frozenset(
    {(one.__module__, one.__qualname__) for one in CLASSES}
    | {("torch", name) for name in DTYPES | {"Size"}}
    | {("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}
    | {(module, "PosixPath") for module in ("pathlib", "pathlib._local")}
)


class PlainUnpickler(pickle._Unpickler):
    """An unpickler that makes only what is named in a closed set.

    It is the one written in Python: the other takes gigabytes for a single wrong byte, the number of a memo's place.
    """

    def __init__(self, content: bytes, names: Collection[tuple[str, str]]) -> None:
        super().__init__(io.BytesIO(content))
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        """Return what has this name. ValueError when it is not in the set."""
        if (module, name) not in self._names:
            raise ValueError(f"it asks for {module}.{name}, which no such file needs")
        # Python 3.13's paths are of a module that older versions do not have.
        return super().find_class("pathlib" if module == "pathlib._local" else module, name)


def unpickled(content: bytes, names: Collection[tuple[str, str]], where: str) -> Any:
    """Return what a pickle holds. ValueError, with where it is from, when it is damaged or asks for anything but
    `names`."""
    try:
        return PlainUnpickler(content, names).load()
    except Exception as error:  # a damaged pickle ends in any
        raise ValueError(f"{where} cannot be read ({error}): take the checkpoint from who made it again") from None


def read_metadata(folder: Path) -> Metadata:
    """Read a folder's `.metadata`. ValueError, with the file, when it is missing or damaged, or asks for other classes
    than torch's, or names a place outside of the folder."""
    file = folder / METADATA
    if not file.is_file():
        raise ValueError(f"{file} is missing: the checkpoint was not finished, take another")
    found = unpickled(file.read_bytes(), METADATA_NAMES, str(file))
    try:
        complaint = next(_complaints(found), None)
    except (AttributeError, TypeError) as error:  # an object without what its class gives it
        complaint = str(error)
    if complaint is not None:
        raise ValueError(f"{file} is damaged ({complaint}): take the checkpoint from who made it again")
    assert isinstance(found, Metadata)
    return found


def _complaints(found: Any) -> Iterator[str]:
    """Yield what is not of its type in a metadata, and chunks without a place."""
    if not isinstance(found, Metadata):
        yield f"it holds a {type(found).__name__}"
    for index, place in found.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, filesystem._StorageInfo):
            yield f"{index} is at {place}"
        name, numbers = place.relative_path, (place.offset, place.length)
        if not isinstance(name, str) or Path(name).name != name:
            yield f"{index.fqn} is in {name!r}, outside of the folder"
        if any(type(one) is not int or one < 0 for one in numbers):
            yield f"{index.fqn} is at {numbers}"
        if place.transform_descriptors is not None:
            yield f"{index.fqn} is compressed, which is not read"
    for key, entry in found.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata | metadata.BytesStorageMetadata):
            yield f"{key} is a {type(entry).__name__}"
        if not isinstance(entry, TensorStorageMetadata):
            continue
        if not isinstance(entry.properties.dtype, torch.dtype):
            yield f"{key} is of {entry.properties.dtype}"
        for chunk in entry.chunks:
            begin, size = chunk.offsets, chunk.sizes
            inside = len(begin) == len(size) == len(entry.size) and all(
                0 <= first <= first + count <= end for first, count, end in zip(begin, size, entry.size, strict=True)
            )
            if not inside:
                yield f"{key} of {entry.size} has a chunk of {size} at {begin}"
            if MetadataIndex(key, chunk.offsets) not in found.storage_data:
                yield f"{key} has a chunk without a place"
