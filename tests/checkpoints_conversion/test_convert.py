"""Conversions between all kinds of checkpoints, their proofs, kills in the middle, and what is wrong with input."""

import errno
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llama_folders import PLAIN, save_model
from model_weights import weights_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from srlm_mega.checkpoints_conversion import build, huggingface_files
from srlm_mega.checkpoints_conversion.bar import no_bar
from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import Report, Resources
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert, open_checkpoint, read_record, recognise
from srlm_mega.checkpoints_conversion.huggingface import open_weights, read_shape, write_folder
from srlm_mega.checkpoints_conversion.layout import column_shard, row_shard, vocabulary_shard
from srlm_mega.checkpoints_conversion.llama import LlamaShape, RopeScaling
from srlm_mega.checkpoints_conversion.logits import compare_logits
from srlm_mega.checkpoints_conversion.model_place import located
from srlm_mega.checkpoints_conversion.reader import Stored
from srlm_mega.checkpoints_conversion.verify import check_verified, prove

ODD_VOCABULARY = 21
GQA = LlamaShape(4, 32, 24, 8, 4, ODD_VOCABULARY, 64, 1e-5, 10000.0)
MHA = replace(GQA, num_query_groups=8)
TIED = replace(GQA, tie_word_embeddings=True)
LLAMA3 = replace(GQA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), rotary_base=500000.0)
SHAPES = {"gqa": GQA, "mha": MHA, "tied": TIED, "llama3": LLAMA3}
SMALL = Resources(jobs=1, max_memory=20_000)  # blocks of 2500 bytes: every matrix takes several
SPLITS = list(itertools.product((1, 2, 4), (1, 2, 4)))
UP = "model.layers.1.mlp.up_proj.weight"
WRITTEN = [kind for kind in Kind if kind is not Kind.GGUF]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests kill processes, not machines."""
    monkeypatch.setattr(build, "sync", lambda path: None)


def model(folder: Path, shape: LlamaShape = GQA, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model folder."""
    weights = {name: tensor.to(dtype) for name, tensor in weights_of(shape).items()}
    write_folder(folder, shape, weights, tokenizer_from=None, max_shard_bytes=10_000)
    return folder


def there(source: Path, destination: Path, kind: Kind, tp: int = 1, pp: int = 1, dtype: DType | None = None) -> Path:
    """Convert in small blocks; returns the folder that holds the model."""
    convert(source, destination, Wish(kind, tp, pp, dtype), SMALL, no_bar)
    return located(destination)


def assert_same_model(one: Path, other: Path) -> None:
    """The same bits by the memory-mapped reader, which shares no code with the conversion."""
    want, got = open_weights(one), open_weights(other)
    assert set(want) == set(got)
    assert all(torch.equal(want[name], got[name]) and want[name].dtype == got[name].dtype for name in want)
    assert read_shape(one) == read_shape(other)


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_is_bit_identical(tmp_path: Path, shape: str) -> None:
    source = model(tmp_path / "model", SHAPES[shape])
    for kind, (tp, pp) in itertools.product((Kind.MEGATRON, Kind.TRTLLM), [*SPLITS, (8, 1)]):
        if kind is Kind.MEGATRON and tp == 8:
            continue  # no key and no token would be left for some ranks
        middle = there(source, tmp_path / f"{kind}{tp}{pp}", kind, tp, pp)
        assert recognise(middle) is kind
        back = there(middle, tmp_path / f"{kind}{tp}{pp}_back", Kind.HUGGINGFACE)
        assert_same_model(source, back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_through_megatron(tmp_path: Path, dtype: torch.dtype) -> None:
    source = model(tmp_path / "model", dtype=dtype)
    middle = there(source, tmp_path / "megatron", Kind.MEGATRON, 2, 2)
    assert_same_model(source, there(middle, tmp_path / "back", Kind.HUGGINGFACE))


def test_megatron_to_trtllm_directly(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    middle = there(source, tmp_path / "megatron", Kind.MEGATRON, 4, 2)
    direct = there(middle, tmp_path / "direct", Kind.TRTLLM, 2, 1)
    want = there(source, tmp_path / "want", Kind.TRTLLM, 2, 1)
    for file in sorted(path.name for path in want.glob("rank*")):
        assert (want / file).read_bytes() == (direct / file).read_bytes()


def test_a_cast_rounds_as_torch_does(tmp_path: Path) -> None:
    source = model(tmp_path / "model", dtype=torch.float32)
    got = open_weights(there(source, tmp_path / "cast", Kind.HUGGINGFACE, dtype=DType.BFLOAT16))
    want = open_weights(source)
    assert all(torch.equal(got[name], want[name].bfloat16()) for name in want)
    assert prove(source, tmp_path / "cast", no_bar).dtype == "bfloat16"


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    weights = weights_of(GQA)
    weights[UP][3, 5] = 70000.0
    write_folder(tmp_path / "large", GQA, weights, tokenizer_from=None)
    with pytest.raises(ValueError, match=rf"{UP}: values too large for float16"):
        there(tmp_path / "large", tmp_path / "out", Kind.HUGGINGFACE, dtype=DType.FLOAT16)


def trtllm_rank(weights: dict[str, Tensor], rank: int, tp: int) -> dict[str, Tensor]:
    """Layer 0 of one rank, by the table in TensorRT-LLM's own words and torch alone; 8 heads in 4 groups, d = 4."""
    layer = {name.removeprefix("model.layers.0."): tensor for name, tensor in weights.items() if ".0." in name}
    q = column_shard(layer["self_attn.q_proj.weight"], rank, tp)
    kv = []
    for name in ("k", "v"):
        heads = layer[f"self_attn.{name}_proj.weight"].view(4, 4, 32)
        heads = heads.repeat_interleave(max(1, tp // 4), dim=0)
        kv.append(column_shard(heads, rank, tp).flatten(0, 1))
    prefix = "transformer.layers.0."
    return {
        prefix + "attention.qkv.weight": torch.cat([q, *kv]),
        prefix + "attention.dense.weight": row_shard(layer["self_attn.o_proj.weight"], rank, tp),
        prefix + "mlp.fc.weight": column_shard(layer["mlp.gate_proj.weight"], rank, tp),
        prefix + "mlp.gate.weight": column_shard(layer["mlp.up_proj.weight"], rank, tp),
        prefix + "mlp.proj.weight": row_shard(layer["mlp.down_proj.weight"], rank, tp),
        prefix + "input_layernorm.weight": layer["input_layernorm.weight"],
        prefix + "post_layernorm.weight": layer["post_attention_layernorm.weight"],
        "transformer.vocab_embedding.weight": vocabulary_shard(weights["model.embed_tokens.weight"], rank, tp),
    }


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_trtllm_ranks_hold_what_the_table_says(tmp_path: Path, tp: int) -> None:
    source = model(tmp_path / "model")
    there(source, tmp_path / "trtllm", Kind.TRTLLM, tp)
    weights = dict(open_weights(source))
    for rank in range(tp):
        got = load_file(tmp_path / f"trtllm/rank{rank}.safetensors")
        for name, want in trtllm_rank(weights, rank, tp).items():
            assert torch.equal(got[name], want), (rank, name)


def test_trtllm_config_of_the_older_form(tmp_path: Path) -> None:
    source = model(tmp_path / "model", LLAMA3)
    config = json.loads((there(source, tmp_path / "trtllm", Kind.TRTLLM, 8) / "config.json").read_text())
    assert config["rotary_base"] == 500000.0 and config["rotary_scaling"]["rope_type"] == "llama3"
    assert config["vocab_size"] == ODD_VOCABULARY and config["mapping"]["world_size"] == 8
    assert config["dtype"] == "bfloat16" and config["quantization"]["quant_algo"] is None


@pytest.mark.parametrize(
    ("kind", "tp", "pp", "message"),
    [
        (Kind.TRTLLM, 1, 3, r"4 layers / PP 3 leaves 1 over \(4 = 1 \* 3 \+ 1\)"),
        (Kind.MEGATRON, 1, 3, r"4 layers / PP 3 leaves 1 over"),
        (Kind.MEGATRON, 8, 1, r"4 query groups / TP 8 leaves 4 over"),
        (Kind.TRTLLM, 3, 1, r"8 attention heads / TP 3 leaves 2 over"),
        (Kind.HUGGINGFACE, 2, 1, r"a Hugging Face folder is not split"),
        (Kind.MEGATRON, 0, 1, r"--tp 0 --pp 1: give positive numbers"),
    ],
)
def test_splits_that_are_not_possible(tmp_path: Path, kind: Kind, tp: int, pp: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        there(model(tmp_path / "model"), tmp_path / "out", kind, tp, pp)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_key_value_heads_that_neither_divide_nor_repeat(tmp_path: Path) -> None:
    shape = replace(GQA, num_attention_heads=12, hidden_size=48, num_query_groups=4)
    with pytest.raises(ValueError, match=r"4 key/value heads can neither be divided over TP 6 nor be repeated"):
        there(model(tmp_path / "model", shape), tmp_path / "out", Kind.TRTLLM, 6)


def test_fp32_is_not_given_to_trtllm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"16-bit weights: add --dtype bfloat16"):
        there(model(tmp_path / "model", dtype=torch.float32), tmp_path / "out", Kind.TRTLLM)


def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    for jobs in (1, 2):
        convert(source, tmp_path / str(jobs), Wish(Kind.TRTLLM, 2, 2), Resources(jobs, 40_000), no_bar)
    for file in sorted(path.name for path in (tmp_path / "1").glob("rank*")):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_an_error_in_a_process_is_told(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    spoil(source, UP, lambda tensor: tensor.index_fill(0, torch.tensor(3), torch.nan))
    with pytest.raises(ValueError, match=rf"{UP} holds values that are not finite"):
        convert(source, tmp_path / "out", Wish(Kind.TRTLLM, 2, 2), Resources(jobs=2), no_bar)
    assert not (tmp_path / "out").exists()


# Kills.


class Killed(Exception):
    """Stands for a kill."""


@contextmanager
def killed_after(limit: int) -> Iterator[Report]:
    """A progress report that ends the process when so many bytes were written."""
    written = 0

    def report(count: int) -> None:
        nonlocal written
        written += count
        if written > limit:
            raise Killed

    yield report


def test_a_killed_conversion_goes_on(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    want = there(source, tmp_path / "want", Kind.TRTLLM, 2)
    wish, out = Wish(Kind.TRTLLM, 2), tmp_path / "out"
    with pytest.raises(Killed):
        convert(source, out, wish, SMALL, lambda what, total: killed_after(20_000))
    assert not out.exists()
    assert not (tmp_path / "out.partial/conversion.json").exists()
    done = len((tmp_path / "out.partial/.journal").read_text().splitlines()) - 1
    assert done > 3
    totals: list[int] = []

    def remember(what: str, total: int) -> "object":
        totals.append(total)
        return no_bar(what, total)

    convert(source, out, wish, SMALL, remember)  # type: ignore[arg-type]
    assert 0 < totals[0] < read_record(want).num_bytes - 15_000
    for file in ("rank0.safetensors", "rank1.safetensors", "config.json"):
        assert (out / file).read_bytes() == (want / file).read_bytes()
    assert not (tmp_path / "out.partial").exists() and not (out / ".journal").exists()


def test_a_conversion_whose_files_were_cut_starts_over(tmp_path: Path) -> None:
    source, out = model(tmp_path / "model"), tmp_path / "out"
    with pytest.raises(Killed):
        convert(source, out, Wish(Kind.TRTLLM, 2), SMALL, lambda what, total: killed_after(20_000))
    os.truncate(tmp_path / "out.partial/rank0.safetensors", 1000)
    there(source, out, Kind.TRTLLM, 2)
    assert prove(source, out, no_bar).num_tensors == 39
    out.rename(tmp_path / "moved")
    out.symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="exists already"):
        there(source, out, Kind.TRTLLM, 2)


def test_another_source_starts_over(tmp_path: Path) -> None:
    """What an earlier version of the source left is not mixed with the new one."""
    source, out = model(tmp_path / "model"), tmp_path / "out"
    with pytest.raises(Killed):
        convert(source, out, Wish(Kind.TRTLLM, 2), SMALL, lambda what, total: killed_after(20_000))
    shutil.rmtree(source)
    weights = {name: tensor.neg().bfloat16() for name, tensor in weights_of(GQA).items()}
    write_folder(source, GQA, weights, tokenizer_from=None)
    there(source, out, Kind.TRTLLM, 2)
    assert prove(source, out, no_bar).num_tensors == 39


@pytest.mark.timing
def test_a_real_kill_and_a_second_process(tmp_path: Path) -> None:
    """SIGKILL of the command with two processes; while it runs, another one is refused."""
    source = model(tmp_path / "model", replace(GQA, num_layers=8))
    code = (
        "import sys, time; from pathlib import Path\n"
        "from srlm_mega.checkpoints_conversion import reader\n"
        "from srlm_mega.checkpoints_conversion.convert import *\n"
        "from srlm_mega.checkpoints_conversion.bar import no_bar\n"
        "read = reader.Reader.rows\n"
        "reader.Reader.rows = lambda *a: (time.sleep(0.01), read(*a))[1]\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), Wish(Kind.MEGATRON, 2), Resources(), no_bar)\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)])
    journal = tmp_path / "out.partial/.journal"
    while process.poll() is None and not (journal.is_file() and len(journal.read_text().splitlines()) > 5):
        time.sleep(0.02)
    with pytest.raises(ValueError, match=r"out\.partial is being written by another process"):
        there(source, out, Kind.MEGATRON, 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    there(source, out, Kind.MEGATRON, 2)
    assert prove(source, out, no_bar).num_tensors == 8 * 9 + 3


# What is wrong with input.


def spoil(folder: Path, name: str, change: "object") -> None:
    """Replace a tensor of a folder."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    save_file(tensors, file)


def refused(source: Path, tmp_path: Path, message: str, kind: Kind = Kind.TRTLLM) -> None:
    """A conversion says this, and leaves nothing that looks finished."""
    with pytest.raises(ValueError, match=message):
        there(source, tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


def test_the_destination_is_never_overwritten(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    there(source, tmp_path / "out", Kind.MEGATRON)
    with pytest.raises(ValueError, match=r"out exists already: remove it"):
        there(source, tmp_path / "out", Kind.MEGATRON)


def test_a_nan_is_named(tmp_path: Path) -> None:
    for number in (torch.nan, torch.inf, -torch.inf, -torch.nan):
        source = model(tmp_path / f"model{number}{id(number)}")
        spoil(source, UP, lambda tensor, number=number: tensor.index_fill(0, torch.tensor(3), number))
        refused(source, tmp_path, rf"model-0000\d-of-\d+\.safetensors: {UP} holds values that are not finite")


def test_wrong_shape_unknown_and_missing_tensors(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    spoil(source, UP, lambda tensor: torch.zeros(25, 32, dtype=torch.bfloat16))
    refused(source, tmp_path, rf"safetensors: {UP} has shape \[25, 32\], by its config it should have \[24, 32\]")
    weights = {name: tensor.bfloat16() for name, tensor in weights_of(GQA).items()}
    for change, message in (
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32).bfloat16()}, "holds unknown tensors: .*q_proj.bias"),
        ({UP: None}, rf"has no tensor {UP}"),
        ({UP: torch.zeros(24, 32)}, r"are of bfloat16, float32"),
        ({UP: torch.zeros(24, 32, dtype=torch.int8)}, rf"{UP} is of dtype I8, supported are F32"),
    ):
        tensors = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
        other = tmp_path / f"other{len(message)}"
        shutil.copytree(source, other, ignore=shutil.ignore_patterns("model*"))
        save_file(tensors, other / "model.safetensors")
        refused(other, tmp_path, message)


def test_truncated_shards_and_missing_files(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    file = sorted(source.glob("model-*"))[2]
    content = file.read_bytes()
    for length in (len(content) - 1, 40, 3, 0):
        file.write_bytes(content[:length])
        refused(source, tmp_path, rf"{file.name} is (truncated|no safetensors file)")
    file.unlink()
    refused(source, tmp_path, rf"{file.name} is missing, and model\.safetensors\.index\.json says it holds")


@pytest.mark.parametrize("kind", [Kind.TRTLLM, Kind.MEGATRON])
def test_damaged_checkpoints_of_other_kinds(tmp_path: Path, kind: Kind) -> None:
    source = there(model(tmp_path / "model"), tmp_path / "middle", kind, 2, 2)
    file = sorted(path for path in source.iterdir() if path.suffix in (".safetensors", ".distcp"))[1]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused(source, tmp_path, rf"{file.name} is truncated", Kind.HUGGINGFACE)
    file.unlink()
    refused(source, tmp_path, rf"{file.name} is missing", Kind.HUGGINGFACE)


def test_replicas_that_differ_are_refused(tmp_path: Path) -> None:
    source = there(model(tmp_path / "model"), tmp_path / "middle", Kind.TRTLLM, 8)
    file = source / "rank3.safetensors"
    tensors = load_file(file)
    tensors["transformer.layers.2.attention.qkv.weight"][5, 0] += 1  # a key that ranks 2 and 3 share
    save_file(tensors, file)
    refused(
        source,
        tmp_path,
        r"rank3\.safetensors: transformer\.layers\.2\.attention\.qkv\.weight differs from the copy of "
        r"model\.layers\.2\.self_attn\.k_proj\.weight in rank2",
        Kind.HUGGINGFACE,
    )


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    source = there(model(tmp_path / "model"), tmp_path / "middle", Kind.MEGATRON)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    refused(source, tmp_path, r"mlp\.linear_fc1\.weight has shape \[4, 48, 32\], by its config it should have")
    metadata = pickle.loads((source / ".metadata").read_bytes())
    del metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    (source / "config.json").write_text(json.dumps(config))
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(source, tmp_path, r"has no tensor decoder\.layers\.mlp\.linear_fc2\.weight")
    (source / ".metadata").unlink()
    refused(source, tmp_path, r"\.metadata is missing: the checkpoint was not finished")


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", tmp_path, r"nothing is no checkpoint: it has neither config\.json")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path / "model")

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device \(\d+,\d+ bytes are needed\).*rank0\.safetensors"):
        there(source, tmp_path / "out", Kind.TRTLLM)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert prove(source, there(source, tmp_path / "out", Kind.TRTLLM), no_bar)  # the same command goes on


def test_writes_of_a_part_of_what_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest follows: of headers too, whose end was left out."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, position: pwrite(file, content[:100], position))
    source = model(tmp_path / "model")
    assert prove(source, there(source, tmp_path / "out", Kind.HUGGINGFACE), no_bar)
    monkeypatch.undo()
    again = model(tmp_path / "whole")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == {
        path.name: path.read_bytes() for path in again.iterdir()
    }


def test_memory_that_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No block that is read is larger than the budget allows, or one row."""
    largest = 0
    read = build.Reader.rows

    def watched(reader: build.Reader, name: str, start: int, count: int) -> object:
        nonlocal largest
        block = read(reader, name, start, count)
        largest = max(largest, block.nbytes)
        return block

    monkeypatch.setattr(build.Reader, "rows", watched)
    there(model(tmp_path / "model"), tmp_path / "out", Kind.TRTLLM, 2)
    assert 64 < largest <= SMALL.block_bytes == 2500


# Proofs.


def test_a_proof_sees_one_changed_bit(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    out = there(source, tmp_path / "out", Kind.MEGATRON, 2, 2)
    proof = prove(source, out, no_bar)
    assert proof.xxh3 == prove(out, source, no_bar).xxh3 == prove(source, source, no_bar).xxh3
    assert (proof.num_tensors, proof.source_kind, proof.destination_kind) == (39, "huggingface", "megatron")
    stored = next(item for item in open_checkpoint(out).stored if "linear_fc2.weight at 2" in item.name)
    with (out / stored.file).open("r+b") as file:
        file.seek(stored.offset + 7)
        byte = file.read(1)[0]
        file.seek(stored.offset + 7)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj\.weight differ"):
        prove(source, out, no_bar)


def test_what_was_converted_needs_a_proof(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    out = there(source, tmp_path / "out", Kind.TRTLLM, 2)
    check_verified(source)  # nobody converted it
    with pytest.raises(ValueError, match=r"converted and not verified: srlm convert verify .*model .*out"):
        check_verified(out)
    prove(source, out, no_bar).save()
    check_verified(out)
    with (out / "rank1.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=r"rank1\.safetensors is not what was verified"):
        check_verified(out)


def test_configs_of_different_models_are_no_proof(tmp_path: Path) -> None:
    one, other = model(tmp_path / "one", GQA), model(tmp_path / "other", LLAMA3)
    with pytest.raises(ValueError, match=r"different models by their configs: rotary_base 10000\.0 and 500000\.0"):
        prove(one, other, no_bar)


def test_logits_and_their_negative_control(tmp_path: Path) -> None:
    source = model(tmp_path / "model", dtype=torch.float32)
    same = compare_logits(source, there(source, tmp_path / "same", Kind.MEGATRON, 2, 2))
    assert same.max_abs_difference == 0 and same.kl == 0 and same.control_kl > 1e-3
    cast = compare_logits(source, there(source, tmp_path / "cast", Kind.TRTLLM, 2, dtype=DType.BFLOAT16))
    assert 0 < cast.kl < cast.control_kl / 10


def test_a_right_cast_of_an_untrained_model_passes_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    """Its attention is nearly uniform, so that rounding changes more than swapped queries and keys do."""
    source = save_model(tmp_path / "model", PLAIN, std=0.02)
    before = (source / "model.safetensors").read_bytes()
    for kind in WRITTEN:
        cast = there(source, tmp_path / kind, kind, dtype=DType.BFLOAT16)
        proof = compare_logits(source, cast)
        assert proof.kl > proof.control_kl / 10 and proof.unrounded_kl < proof.control_kl / 1000
    assert (source / "model.safetensors").read_bytes() == before, "the control changed a copy"
    weights = dict(open_weights(tmp_path / "huggingface"))
    weights[UP] = weights[UP].roll(1, 0)
    write_folder(tmp_path / "wrong", read_shape(source), weights, tokenizer_from=None)
    with pytest.raises(ValueError, match=r"does not compute what .* without the rounding to bfloat16"):
        compare_logits(source, tmp_path / "wrong")


def swap_gate_and_up(stored: list[Stored]) -> list[Stored]:
    places = {item.name: number for number, item in enumerate(stored)}
    gate, up = stored[places[UP.replace("up", "gate")]], stored[places[UP]]
    mixed = list(stored)
    mixed[places[gate.name]] = replace(gate, file=up.file, offset=up.offset)
    mixed[places[UP]] = replace(up, file=gate.file, offset=gate.offset)
    return mixed


def test_a_wrong_reader_of_hugging_face_folders_fails_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it takes for the model is consistent everywhere; transformers reads another one."""
    source, right = model(tmp_path / "model"), huggingface_files.stored_tensors
    monkeypatch.setattr(huggingface_files, "stored_tensors", lambda *args: swap_gate_and_up(right(*args)))
    wrong = there(source, tmp_path / "wrong", Kind.MEGATRON)
    prove(source, wrong, no_bar)
    with pytest.raises(ValueError, match="does not compute what"):
        compare_logits(source, wrong)


def test_an_output_taken_for_the_embedding_fails_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, right = model(tmp_path / "model"), LlamaShape.from_huggingface
    monkeypatch.setattr(LlamaShape, "from_huggingface", lambda config: replace(right(config), tie_word_embeddings=True))
    wrong = there(source, tmp_path / "wrong", Kind.MEGATRON)
    prove(source, wrong, no_bar)
    with pytest.raises(ValueError, match="does not compute what"):
        compare_logits(source, wrong)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_comparison_knows_every_shape(tmp_path: Path, shape: str) -> None:
    source = model(tmp_path / "model", SHAPES[shape])
    for kind in WRITTEN:
        assert compare_logits(source, there(source, tmp_path / kind, kind)).unrounded_kl < 1e-9


def test_swapped_queries_and_keys_fail_the_proofs(tmp_path: Path) -> None:
    source = model(tmp_path / "model", MHA, torch.float32)
    weights = dict(open_weights(source))
    attention = "model.layers.0.self_attn."
    q, k = weights[f"{attention}q_proj.weight"], weights[f"{attention}k_proj.weight"]
    swapped = weights | {f"{attention}q_proj.weight": k, f"{attention}k_proj.weight": q}
    write_folder(tmp_path / "swapped", MHA, swapped, tokenizer_from=None)
    with pytest.raises(ValueError, match=r"k_proj\.weight.* differ"):
        prove(source, tmp_path / "swapped", no_bar)
    with pytest.raises(ValueError, match=r"does not compute what .* with swapped queries and keys it would be"):
        compare_logits(source, tmp_path / "swapped")
