"""The files of Hugging Face folders, without torch: config.json, the tokenizer, and which file holds which matrix, for
folders that are read (reader.py) and written (build.py)."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import OutputFile, Plan
from srlm_mega.checkpoints_conversion.json_files import MAX_OBJECT_BYTES, parse_object
from srlm_mega.checkpoints_conversion.llama import (
    EMBEDDING,
    OUTPUT,
    ROTARY_TABLE,
    LlamaShape,
    check_names,
    check_size,
    huggingface_shapes,
    is_derived,
)
from srlm_mega.checkpoints_conversion.patches import Matrix, whole
from srlm_mega.checkpoints_conversion.reader import Checkpoint, Stored, Widened
from srlm_mega.checkpoints_conversion.safetensors_file import FileTensor, lay_out, read_header, read_scale, same_bytes

KIND = "huggingface"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION,  # names the end tokens that stop generation
)
LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}
MAX_SHARD_BYTES = 5 * 1000**3
SCALES = (".weight_scale", ".input_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class TensorEntry(FileTensor):
    """A tensor to be written: patchwork, with its scale if it is FP8, or known bytes."""

    content: Matrix | bytes
    scale: float | None = None


def read_json(file: Path) -> dict[str, Any]:
    """Read a file's JSON object. ValueError when the file does not exist or holds none."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist: {file.parent} is not a Hugging Face model folder")
    with file.open("rb") as content:
        return parse_object(content.read(MAX_OBJECT_BYTES + 1), file)


def read_config(folder: Path) -> tuple[dict[str, Any], LlamaShape]:
    """Read a folder's config.json, and the shape that it says. ValueError, with the file, for any but a plain Llama."""
    config = read_json(folder / CONFIG)
    try:
        return config, LlamaShape.from_huggingface(config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None


def files_by_tensor(folder: Path) -> dict[str, str]:
    """Return the file of each tensor of a folder. ValueError when the index names a file that is not there, or when
    other readers would take other weights: there are two sets of them, or a tied output that is not the embedding."""
    files = files_of_tensors(folder)
    for name, file in files.items():
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file} is missing, and {INDEX} says it holds {name}: download the folder again")
    if (folder / INDEX).is_file() and (folder / WEIGHTS).is_file():
        check_same_weights(folder, files)
    if read_json(folder / CONFIG).get("tie_word_embeddings") and {EMBEDDING, OUTPUT} <= files.keys():
        check_tied_output(folder, files[EMBEDDING], files[OUTPUT])
    return files


def files_of_tensors(folder: Path) -> dict[str, str]:
    """Return the file of each tensor of a folder, by its index or the one file's header. ValueError without both."""
    if (folder / INDEX).is_file():
        return read_index(folder / INDEX)
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(read_header(folder / WEIGHTS), WEIGHTS)
    raise ValueError(
        f"{folder} has neither {WEIGHTS} nor {INDEX}: download the model's safetensors (pytorch_model.bin is not read)"
    )


def read_index(file: Path) -> dict[str, str]:
    """Read the file of each tensor from an index. ValueError when it says none, or names one outside of its folder."""
    files = read_json(file).get("weight_map", {})
    if not isinstance(files, dict):
        raise ValueError(f"{file} has no `weight_map` from tensors to files: download it again")
    for name, where in files.items():
        if not isinstance(where, str) or Path(where).name != where:
            raise ValueError(f"{file}: {name} is in {where!r}, which is no file of this folder: download it again")
    return files


def check_same_weights(folder: Path, files: Mapping[str, str]) -> None:
    """ValueError, at the first difference, unless the files of the index hold what `model.safetensors` holds, which
    transformers reads in their place."""
    single = read_header(folder / WEIGHTS)
    headers = {file: read_header(folder / file) for file in dict.fromkeys(files.values())}
    indexed = {name: headers[file][name] for name, file in files.items() if name in headers[file]}
    names = [name for name in indexed | single if not name.endswith(ROTARY_TABLE)]
    kinds = [{name: (tensor.dtype, tensor.shape) for name, tensor in side.items()} for side in (single, indexed)]
    differing = chain(  # headers first: they are read in no time, and most differences are in them
        (name for name in names if kinds[0].get(name) != kinds[1].get(name)),
        (name for name in names if not same_bytes(folder / WEIGHTS, single[name], folder / files[name], indexed[name])),
    )
    if (name := next(differing, None)) is not None:
        raise ValueError(
            f"{folder} holds two models: {name} differs between {WEIGHTS}, which transformers reads, and "
            f"{files.get(name, 'the files')} of {INDEX}: remove {WEIGHTS} or {INDEX}, whichever is not the model's"
        )


def check_tied_output(folder: Path, embedding: str, output: str) -> None:
    """ValueError unless the output layer of a tied model is its embedding. `embedding` and `output` are their files."""
    first, second = read_header(folder / embedding).get(EMBEDDING), read_header(folder / output).get(OUTPUT)
    if first and second and not same_bytes(folder / embedding, first, folder / output, second):
        raise ValueError(
            f"{folder / CONFIG} has tie_word_embeddings true, and {OUTPUT} in {output} differs from {EMBEDDING} in "
            f"{embedding}: set tie_word_embeddings to false in {CONFIG} if {OUTPUT} is the trained output layer, or "
            f"remove {OUTPUT} from {output}"
        )


def special_ids(tokenizer_from: Path | None) -> dict[str, Any]:
    """Return a folder's ids of special tokens, from its config.json or generation_config.json, else Llama's."""
    files = [] if tokenizer_from is None else [tokenizer_from / CONFIG, tokenizer_from / GENERATION]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return LLAMA_IDS
    source = read_json(file)
    ids: dict[str, Any] = {
        key: source[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in source
    }
    for key, value in ids.items():
        if value is not None and any(type(one) is not int for one in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{file}: {key} is {value!r}, and should be a token's id: take the file it came with")
    return ids


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy those of the tokenizer's files that exist."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def pretty_json(content: Mapping[str, Any]) -> bytes:
    """Return indented JSON that ends in a line break."""
    return orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder with `config.json` and safetensors. ValueError names the file and tensor that are wrong."""
    config, shape = read_config(folder)
    stored = stored_tensors(folder, shape, SCALES if "quantization_config" in config else ())
    dtype, stored = in_one_dtype(stored, folder)
    model = whole_config(config, shape) | special_ids(folder)
    return Checkpoint(folder, KIND, shape, model, dtype, tuple(stored)).check()


def stored_tensors(folder: Path, shape: LlamaShape, ignored: tuple[str, ...] = ()) -> list[Stored]:
    """Find each tensor of a folder, in the order of the model, without those whose names end in one of `ignored`.
    ValueError names the file and tensor that are wrong."""
    files = {
        name: file
        for name, file in files_by_tensor(folder).items()
        if not is_derived(name, shape) and not name.endswith(ignored)
    }
    check_names(files, shape, str(folder))
    headers = {file: read_header(folder / file) for file in dict.fromkeys(files.values())}
    return [
        stored_tensor(folder, files[name], headers[files[name]], name, size, whole(name, size), f"{name}_scale")
        for name, size in huggingface_shapes(shape).items()
    ]


def stored_tensor(
    folder: Path,
    file: str,
    header: Mapping[str, FileTensor],
    name: str,
    size: tuple[int, ...],
    matrix: Matrix,
    scale_name: str,
) -> Stored:
    """Find a tensor in a safetensors file, and its scale if it is FP8. ValueError for a missing or misshapen one."""
    path = folder / file
    if name not in header:
        raise ValueError(f"{path} has no tensor {name}, and should have by its config or index: download it again")
    tensor = header[name]
    check_size(name, tensor.shape, size, str(path))
    scale = read_scale(path, header, scale_name) if tensor.dtype is DType.FLOAT8_E4M3 else None
    return Stored(name, file, tensor.offset, tensor.dtype, matrix, scale)


def in_one_dtype(stored: list[Stored], folder: Path) -> tuple[DType, list[Stored]]:
    """Return the dtype of all matrices without a scale, and the matrices: of several dtypes as float32. ValueError for
    several beside FP8, and for FP8 without a scale."""
    dtypes = {item.dtype for item in stored if item.scale is None}
    if len(dtypes) == 1 and DType.FLOAT8_E4M3 not in dtypes:
        return dtypes.pop(), stored
    if not dtypes or DType.FLOAT8_E4M3 in dtypes or any(item.scale is not None for item in stored):
        found = ", ".join(sorted(dtype.torch_name for dtype in dtypes))
        raise ValueError(f"the weights in {folder} are of {found}: give a model of one of float32, float16, bfloat16")
    wide = DType.FLOAT32
    return wide, [
        item if item.dtype is wide else replace(item, dtype=wide, encoding=Widened(item.dtype)) for item in stored
    ]


def whole_config(config: Mapping[str, Any], shape: LlamaShape) -> dict[str, Any]:
    """Return a folder's own config.json, all keys but that of a quantization, with those of transformers 4 that it
    lacks: other readers want them."""
    own = {key: value for key, value in config.items() if key != "quantization_config" or value is None}
    return own | shape.to_huggingface() | {key: value for key, value in own.items() if value is not None}


def typed_config(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """Return a config that names this dtype; `dtype` is transformers 5's key."""
    return {**config, "torch_dtype": dtype.torch_name, **({"dtype": dtype.torch_name} if "dtype" in config else {})}


def plan(shape: LlamaShape, config: Mapping[str, Any], dtype: DType, max_shard_bytes: int = MAX_SHARD_BYTES) -> Plan:
    """Plan a folder that transformers loads."""
    entries = [TensorEntry(name, dtype, size, whole(name, size)) for name, size in huggingface_shapes(shape).items()]
    outputs, stored, texts = safetensors_shards(entries, max_shard_bytes)
    texts[CONFIG] = pretty_json(typed_config(config, dtype))
    return Plan(KIND, dtype, outputs, stored, texts)


def safetensors_shards(
    entries: list[TensorEntry], max_shard_bytes: int
) -> tuple[tuple[OutputFile, ...], tuple[Stored, ...], dict[str, bytes]]:
    """Lay out one `model.safetensors`, or several with their index among the texts."""
    groups = list(_shards(entries, max_shard_bytes))
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        return *safetensors_files({WEIGHTS: groups[0]}), {}
    weight_map = {entry.name: name for name, group in zip(names, groups, strict=True) for entry in group}
    total = sum(entry.nbytes for entry in entries)
    index = pretty_json({"metadata": {"total_size": total}, "weight_map": weight_map})
    return *safetensors_files(dict(zip(names, groups, strict=True))), {INDEX: index}


def safetensors_files(files: Mapping[str, list[TensorEntry]]) -> tuple[tuple[OutputFile, ...], tuple[Stored, ...]]:
    """Lay out files with these tensors in this order."""
    outputs, stored = [], []
    for file, entries in files.items():
        header, placed, size = lay_out(entries)
        constants = [(0, header)]
        for entry in placed:
            if isinstance(entry.content, bytes):
                constants.append((entry.offset, entry.content))
            else:
                stored.append(Stored(entry.name, file, entry.offset, entry.dtype, entry.content, entry.scale))
        outputs.append(OutputFile(file, size, tuple(constants)))
    return tuple(outputs), tuple(stored)


def _shards(entries: list[TensorEntry], max_bytes: int) -> Iterator[list[TensorEntry]]:
    """Cut the tensors into files of at most `max_bytes`, or of one tensor that is larger."""
    shard: list[TensorEntry] = []
    filled = 0
    for entry in entries:
        if shard and filled + entry.nbytes > max_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(entry)
        filled += entry.nbytes
    yield shard
