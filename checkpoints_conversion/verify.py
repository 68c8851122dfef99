"""The proof of a conversion: both sides are read as Hugging Face's tensors, block by block, and hashed.

They are read by the description of each layout, which is tested against independent implementations.
"""

import hashlib
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import xxhash

from srlm_mega.checkpoints_conversion import trtllm
from srlm_mega.checkpoints_conversion.bar import no_bar
from srlm_mega.checkpoints_conversion.bits import Bits, cast
from srlm_mega.checkpoints_conversion.build import MAX_BLOCK_BYTES, Report
from srlm_mega.checkpoints_conversion.convert import PROOF, RECORD, Bar, open_checkpoint
from srlm_mega.checkpoints_conversion.fp8 import Quantizer, Rounding, largest_weights, linear_names, shared_scales
from srlm_mega.checkpoints_conversion.huggingface_files import pretty_json, read_json
from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.checkpoints_conversion.model_place import followed
from srlm_mega.checkpoints_conversion.reader import Checkpoint, Reader

SHOWN = 5
DECIDING = frozenset({".json", ".safetensors", ".bin", ".model", ".jinja", ".distcp", ".pt", ".metadata"})
QUICK_HASH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ProvenFile:
    """Size in bytes and xxh3-128 of a file of a folder that was verified."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Proof:
    """`proof.json`: two checkpoints hold the same numbers, apart from a cast to `dtype`. `xxh3` hashes all tensors in
    the order of the model, as numbers of `dtype`: every right copy of a model has the same."""

    source: str
    destination: str
    source_kind: str
    destination_kind: str
    source_dtype: str
    dtype: str
    num_tensors: int
    num_bytes: int
    xxh3: str
    seconds: float
    files: dict[str, ProvenFile]  # of the destination: weights, config, tokenizer

    def save(self) -> None:
        """Write it into the destination's folder."""
        (Path(self.destination) / PROOF).write_bytes(pretty_json(asdict(self)))


def check_has_proof(folder: Path) -> None:
    """ValueError when a folder was converted and not verified. What no conversion made (it has no `conversion.json`),
    such as the trainer's export, needs no proof."""
    folder = followed(folder)
    if (folder / RECORD).is_file() and not (folder / PROOF).is_file():
        raise ValueError(f"{folder} was converted and not verified: {verifying(folder)}")


def check_verified(folder: Path, quick: bool = False) -> None:
    """ValueError when a folder was converted and not verified, or a file of it is another one since. `quick` compares
    only the size of files above 256 MiB."""
    folder = followed(folder)
    check_has_proof(folder)
    proven = proven_files(folder)
    if proven is None and (folder / RECORD).is_file():
        raise ValueError(f"{folder / PROOF} has no hashes (an older version wrote none): {verifying(folder)}")
    if proven is None:
        return
    for name in sorted(proven.keys() | deciding_files(folder)):
        if (found := difference(folder / name, proven.get(name), quick)) is not None:
            raise ValueError(
                f"{folder / name} is not what was verified ({found}). Restore it, or convert again, then: "
                f"{verifying(folder)}"
            )


def verifying(folder: Path) -> str:
    """Return the command that verifies a converted folder."""
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    source = str(record.get("source", "SOURCE"))
    return shlex.join(("srlm", "convert", "verify", source, os.path.abspath(folder)))


def proven_files(folder: Path) -> dict[str, ProvenFile] | None:
    """Read the files of a folder's proof, by name; None where no proof says their hashes."""
    try:
        return {name: ProvenFile(**entry) for name, entry in read_json(followed(folder) / PROOF)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def deciding_files(folder: Path) -> set[str]:
    """Return the names of a folder's files that decide what its model computes; none for a file."""
    found = {path for path in folder.glob("*") if path.is_file() and path.name != PROOF}
    return {path.name for path in found if (path.suffix or path.name) in DECIDING}


def difference(path: Path, proven: ProvenFile | None, quick: bool) -> str | None:
    """Return how a file differs from what was verified, None when it does not."""
    if proven is None:
        return "it was added"
    if not path.is_file():
        return "it is missing"
    if path.stat().st_size != proven.bytes:
        return f"it has {path.stat().st_size} bytes, had {proven.bytes}"
    if not (quick and proven.bytes > QUICK_HASH_BYTES) and (now := file_hash(path)) != proven.xxh3_128:
        return f"its xxh3-128 is {now}, was {proven.xxh3_128}"
    return None


def file_hash(path: Path) -> str:
    """Return the xxh3-128 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def prove(source: Path, destination: Path, bar: Bar = no_bar) -> Proof:
    """Verify that both folders hold the same model. ValueError says where they differ, or which one is broken."""
    started = time.monotonic()
    source, destination = followed(source), followed(destination)
    if proven_files(source) is not None:  # else what is damaged would be proven to be what it is
        check_verified(source)
    first, second = open_checkpoint(source), open_checkpoint(destination)
    if first.is_fp8 and not second.is_fp8:
        raise ValueError(f"{source} is FP8 and {destination} is not: give the model it was made from first")
    check_shapes(first, second)
    whole = xxhash.xxh3_128()
    differing = []
    with (
        Reader(first) as one,
        Reader(second) as two,
        bar(f"{first.kind} = {second.kind}", first.num_bytes + second.num_bytes) as report,
    ):
        for name in second.sources:
            want = _hash(_as_stored(one, first, second, name), report)
            found = _hash(two.blocks(name, MAX_BLOCK_BYTES), report)
            if want != found:
                differing.append(name)
            whole.update(found)  # of what the destination holds, as it holds it
        if second.is_fp8:
            differing += wrong_scales(first, second, one)
    if differing:
        more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise ValueError(
            f"{destination} is not {source}: {', '.join(differing[:SHOWN])}{more} differ. Convert it again"
        )
    return Proof(
        source=str(source.resolve()),
        destination=str(destination.resolve()),
        source_kind=first.kind,
        destination_kind=second.kind,
        source_dtype=first.dtype.torch_name,
        dtype=second.dtype.torch_name,
        num_tensors=len(second.sources),
        num_bytes=second.num_bytes,
        xxh3=whole.hexdigest(),
        seconds=time.monotonic() - started,
        files={
            name: ProvenFile((second.folder / name).stat().st_size, file_hash(second.folder / name))
            for name in sorted({item.file for item in second.stored} | deciding_files(destination))
        },
    )


def check_shapes(first: Checkpoint, second: Checkpoint) -> None:
    """ValueError when the configs describe different models."""
    if first.shape != second.shape:
        names = [item.name for item in fields(LlamaShape)]
        pairs = [(name, getattr(first.shape, name), getattr(second.shape, name)) for name in names]
        text = ", ".join(f"{name} {one} and {two}" for name, one, two in pairs if one != two)
        raise ValueError(f"{first.folder} and {second.folder} are different models by their configs: {text}")


def wrong_scales(first: Checkpoint, second: Checkpoint, reader: Reader) -> list[str]:
    """Return FP8 tensors whose scale is not that of their group's largest weight. `reader` has read all of `first`."""
    linears = list(linear_names(first.shape))
    wanted = shared_scales(largest_weights(first, second.dtype, reader, linears))
    found = {name: second.sources[f"{name}.weight"].cover[0][1].scale for name in linears}
    return [f"{name}.weight (scale)" for name in linears if found[name] != wanted[name]]


def _as_stored(reader: Reader, first: Checkpoint, second: Checkpoint, name: str) -> Iterator[Bits]:
    """Yield the blocks of a tensor of `first` as `second` should hold them."""
    source = second.sources[name]
    rounding = Rounding.DIRECT if second.kind == trtllm.KIND else Rounding.BY_16_BITS
    for block in reader.blocks(name, MAX_BLOCK_BYTES):
        block = cast(block, first.dtype, second.dtype)
        scale = source.cover[0][1].scale
        yield block if scale is None else Quantizer(rounding)(block, second.dtype, scale)


def _hash(blocks: Iterator[Bits], report: Report) -> bytes:
    digest = xxhash.xxh3_128()
    for block in blocks:
        digest.update(block.view("u1").data)
        report(block.nbytes)
    return digest.digest()
