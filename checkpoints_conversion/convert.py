"""`srlm convert`: from any kind of checkpoint to any other, with a record that is written last.

Only Megatron's checkpoints need torch: everything else starts without it.
"""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from srlm_mega.checkpoints_conversion import fp8, huggingface_files, jobs, torch_dist, trtllm
from srlm_mega.checkpoints_conversion.bar import no_bar
from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import Plan, Report, Resources, building
from srlm_mega.checkpoints_conversion.fp8 import Amax
from srlm_mega.checkpoints_conversion.huggingface_files import CONFIG, copy_tokenizer, pretty_json, read_json
from srlm_mega.checkpoints_conversion.model_place import DISTRIBUTED, located
from srlm_mega.checkpoints_conversion.other_files import OtherFiles, other_files
from srlm_mega.checkpoints_conversion.reader import Checkpoint

RECORD, PROOF = "conversion.json", "proof.json"
Bar = Callable[[str, int], AbstractContextManager[Report]]  # (what, bytes to write) -> report


class Kind(StrEnum):
    """The kinds of checkpoints."""

    HUGGINGFACE = huggingface_files.KIND
    MEGATRON = "megatron"
    TRTLLM = trtllm.KIND
    GGUF = "gguf"  # read, never written


@dataclass(frozen=True)
class Wish:
    """The checkpoint that a conversion should make. `dtype` None keeps the source's."""

    to: Kind
    tp: int = 1
    pp: int = 1
    dtype: DType | None = None
    amax: Amax | None = None  # with it, linear layers become FP8


@dataclass(frozen=True)
class Record:
    """`conversion.json`, written last, so that a folder with one is complete. `model` has Hugging Face's keys."""

    kind: str
    dtype: str
    tp: int
    pp: int
    source: str
    source_kind: str
    num_bytes: int
    is_fp8: bool
    model: dict[str, Any]
    source_formats: dict[str, int] = field(default_factory=dict)  # number of matrices of each, such as Q4_K
    left_out: list[str] = field(default_factory=list)  # files and tensors of the source that the folder has not


def recognise(folder: Path) -> Kind:
    """Return the kind of a checkpoint. ValueError, with the way out, for a path that leads to none."""
    place = located(folder)
    if place.is_file():
        return Kind.GGUF
    if (place / DISTRIBUTED).is_file():
        return Kind.MEGATRON
    return Kind.TRTLLM if "mapping" in read_json(place / CONFIG) else Kind.HUGGINGFACE


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any kind. ValueError names the file and tensor that are wrong."""
    folder = located(path)
    match recognise(folder):
        case Kind.HUGGINGFACE:
            return huggingface_files.open_checkpoint(folder)
        case Kind.MEGATRON:
            from srlm_mega.checkpoints_conversion import torch_dist_reader

            return torch_dist_reader.open_checkpoint(folder)
        case Kind.TRTLLM:
            model = read_record(folder).model if (folder / RECORD).is_file() else {}
            checkpoint = trtllm.open_checkpoint(folder, tied=model.get("tie_word_embeddings", False))
            return replace(checkpoint, config=checkpoint.config | model)
        case Kind.GGUF:
            from srlm_mega.checkpoints_conversion import gguf_model

            return gguf_model.open_checkpoint(folder)


def check_wish(source: Checkpoint, wish: Wish, is_fp8: bool) -> DType:
    """Return the number format of the destination's weights, or of those that become FP8. ValueError when the wish does
    not fit the model."""
    if source.is_fp8:
        raise ValueError(f"{source.folder} is FP8, which is not undone: convert the model it was made from")
    if wish.tp < 1 or wish.pp < 1:
        raise ValueError(f"--tp {wish.tp} --pp {wish.pp}: give positive numbers")
    if wish.to is Kind.HUGGINGFACE and (wish.tp, wish.pp) != (1, 1):
        raise ValueError("a Hugging Face folder is not split: leave --tp and --pp out")
    if source.is_mixed and wish.dtype is None:
        found = {DType(name).torch_name: count for name, count in source.formats.items()}
        raise ValueError(
            f"the weights in {source.folder} are of {', '.join(sorted(found))} "
            f"({', '.join(f'{found[name]:,}' for name in sorted(found))} matrices): choose one, --dtype float32 keeps "
            "every number, --dtype bfloat16 (or float16) rounds"
        )
    dtype = wish.dtype or source.kept or source.dtype
    if is_fp8 and dtype is DType.FLOAT32:
        raise ValueError("FP8 is made of 16-bit weights: add --dtype bfloat16 (or float16)")
    if is_fp8 and wish.to is Kind.MEGATRON:
        raise ValueError("Megatron keeps 16-bit weights and casts by itself: --fp8 is for huggingface and trtllm")
    if is_fp8 and wish.to is Kind.TRTLLM:
        trtllm.check_split(source.shape, trtllm.RankSplit(wish.tp, wish.pp))
    return dtype


def make_plan(source: Checkpoint, wish: Wish, bar: Bar) -> Plan:
    """Plan the destination's files. ValueError when the wish does not fit the model."""
    dtype = check_wish(source, wish, wish.amax is not None)
    if wish.amax is not None:
        return _fp8_plan(source, wish, dtype, wish.amax, bar)
    match wish.to:
        case Kind.HUGGINGFACE:
            return huggingface_files.plan(source.shape, source.config, dtype)
        case Kind.MEGATRON:
            return torch_dist.plan(source.shape, source.config, dtype, wish.tp, wish.pp)
        case Kind.TRTLLM:
            return trtllm.plan(source.shape, trtllm.RankSplit(wish.tp, wish.pp), dtype)
        case Kind.GGUF:
            raise ValueError("GGUF files are read and not written: llama.cpp's convert_hf_to_gguf.py makes them")


def _fp8_plan(source: Checkpoint, wish: Wish, dtype: DType, amax: Amax, bar: Bar) -> Plan:
    split = trtllm.RankSplit(wish.tp, wish.pp)
    with bar("ranges of the weights", source.num_bytes) as report:
        weights = fp8.shared_scales(fp8.weight_amax(source, dtype, report))
    scales = fp8.Scales(weights, fp8.shared_scales(amax.inputs))
    if wish.to is Kind.TRTLLM:
        return fp8.engine_plan(source.shape, split, dtype, scales)
    return fp8.unified_plan(source.shape, source.config, dtype, scales)


def convert(source: Path, destination: Path, wish: Wish, resources: Resources, bar: Bar = no_bar) -> Record:
    """Make `destination` from `source`; called again after a kill, it resumes. ValueError for bad input, OSError when
    full."""
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, wish, bar)
    others = OtherFiles()
    if checkpoint.kind == plan.kind == Kind.HUGGINGFACE:
        others = other_files(checkpoint, {*plan.texts, *(output.name for output in plan.outputs), RECORD, PROOF})
    record = Record(
        kind=plan.kind,
        dtype=plan.dtype.torch_name,
        tp=wish.tp,
        pp=wish.pp,
        source=str(source.resolve()),
        source_kind=checkpoint.kind,
        num_bytes=plan.num_bytes,
        is_fp8=plan.quantizer is not None,
        model=checkpoint.config,
        source_formats=checkpoint.formats,
        left_out=others.left_out,
    )
    extra = {**_tokenizer_texts(source), RECORD: pretty_json(asdict(record))}
    plan = replace(plan, texts={**plan.texts, **{str(plan.folder / name): text for name, text in extra.items()}})
    with building(checkpoint, plan, destination, resources.block_bytes) as (work, done):
        left = [(number, task) for number, task in enumerate(plan.tasks()) if number not in done]
        total = sum(stored.nbytes for _, task in left for stored in task)
        with bar(f"{checkpoint.kind} -> {plan.kind}", total) as report:
            jobs.run(work, left, resources.jobs, report)
        copy_tokenizer(located(source), work.folder / plan.folder)
        for name in others.kept:
            (work.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.folder / name, work.folder / name)
    return record


def _tokenizer_texts(source: Path) -> dict[str, bytes]:
    """Rebuild the tokenizer's files where the source has it in another form."""
    if recognise(source) is not Kind.GGUF:
        return {}
    from srlm_mega.checkpoints_conversion import gguf_tokenizer

    return gguf_tokenizer.tokenizer_files(source)


def read_record(folder: Path) -> Record:
    """Read the record of a converted folder. ValueError when it has none."""
    try:
        record = Record(**read_json(folder / RECORD))
    except TypeError as error:
        raise ValueError(f"{folder / RECORD} is no record of a conversion ({error}): convert it again") from None
    if not isinstance(record.model, dict):
        raise ValueError(f"{folder / RECORD}: its model is {record.model!r}, and should be an object: convert it again")
    return record
