"""Model folders in Hugging Face's layout as torch tensors: read by name, written one tensor at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srlm_mega.checkpoints_conversion.bits import dtype_named
from srlm_mega.checkpoints_conversion.build import allocate
from srlm_mega.checkpoints_conversion.huggingface_files import (
    MAX_SHARD_BYTES,
    copy_tokenizer,
    plan,
    read_config,
    special_ids,
    stored_tensors,
)
from srlm_mega.checkpoints_conversion.llama import LlamaShape, check_names, check_size, huggingface_shapes

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def read_shape(folder: Path) -> LlamaShape:
    """Read the shape of the model in a folder. ValueError when there is no model, or it is no plain Llama."""
    return read_config(folder)[1]


def open_weights(folder: Path) -> Mapping[str, Tensor]:
    """Return the weights of a folder by name, each read from the disk when it is asked for.

    Names and shapes are checked now, values as they are read. ValueError names the file and the tensor.
    """
    return FolderWeights(folder)


class FolderWeights(Mapping[str, Tensor]):
    """The memory-mapped safetensors of a folder: `model.safetensors`, or the shards that its index names."""

    def __init__(self, folder: Path) -> None:
        self._files = {item.name: folder / item.file for item in stored_tensors(folder, read_shape(folder))}
        self._open = {file: _open(file) for file in dict.fromkeys(self._files.values())}

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        tensor: Tensor = self._open[file].get_tensor(name)
        check_finite(name, tensor, str(file))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def check_finite(name: str, tensor: Tensor, where: str) -> None:
    """ValueError when a weight is NaN or infinite."""
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise ValueError(f"{where}: {name} holds {bad} values that are not finite: the model is broken, take another")


def write_folder(
    folder: Path,
    shape: LlamaShape,
    weights: Mapping[str, Tensor],
    tokenizer_from: Path | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model that transformers loads, one tensor after another. The same weights give the same bytes.

    ValueError for weights that are not those of `shape`, not finite, or not of one dtype; config.json is written last.
    """
    check_names(weights, shape, "the model to write")
    names = list(huggingface_shapes(shape))
    writer = FolderWriter(folder, shape, weights[names[0]].dtype, tokenizer_from, max_shard_bytes)
    for name in names:
        writer.write(name, weights[name])
    writer.finish()


class FolderWriter:
    """A model folder whose tensors arrive one at a time, in any order, so that only one of them is in memory. The
    tokenizer's files, and the ids of its special tokens, are those of `tokenizer_from`."""

    def __init__(
        self,
        folder: Path,
        shape: LlamaShape,
        dtype: torch.dtype,
        tokenizer_from: Path | None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"the weights are of {dtype}: give one of {', '.join(DTYPES.values())}")
        self._folder, self._dtype, self._tokenizer_from = folder, dtype, tokenizer_from
        config = shape.to_huggingface() | special_ids(tokenizer_from)
        self._plan = plan(shape, config, dtype_named(DTYPES[dtype]), max_shard_bytes)
        self._sizes = huggingface_shapes(shape)
        self._left = {stored.name: stored for stored in self._plan.stored}
        folder.mkdir(parents=True, exist_ok=True)
        for output in self._plan.outputs:
            allocate(folder / output.name, output)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place. ValueError when it is not finite, or of another size or dtype."""
        check_size(name, tuple(tensor.shape), self._sizes[name], str(self._folder))
        if tensor.dtype is not self._dtype:
            raise ValueError(f"the weights are of {self._dtype} and {tensor.dtype} ({name}): give them one dtype")
        check_finite(name, tensor, str(self._folder))
        stored = self._left.pop(name)
        with (self._folder / stored.file).open("r+b") as file:
            file.seek(stored.offset)
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Write the small files that make the folder a model, config.json last."""
        assert not self._left, f"never written: {sorted(self._left)[:3]}"
        if self._tokenizer_from is not None:
            copy_tokenizer(self._tokenizer_from, self._folder)
        for name, content in self._plan.texts.items():  # config.json is the last of them
            (self._folder / name).write_bytes(content)


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error}): download it again") from None
