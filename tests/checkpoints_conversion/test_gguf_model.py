"""GGUF files become Hugging Face folders: the weights, the shape, what is said about them, and what is refused."""

import json
import os
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import metadata_of, rope_freqs, tensors_of, tokenizer_metadata, write_gguf
from model_weights import weights_of
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import Resources
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert, open_checkpoint, read_record
from srlm_mega.checkpoints_conversion.gguf_model import recover_rope_scaling
from srlm_mega.checkpoints_conversion.huggingface import open_weights, read_shape
from srlm_mega.checkpoints_conversion.llama import LlamaShape, RopeScaling
from srlm_mega.checkpoints_conversion.logits import compare_logits
from srlm_mega.checkpoints_conversion.verify import check_verified, prove
from srlm_mega.cli.convert import activation_ranges
from srlm_mega.errors import USER_ERROR, UserError

GQA = LlamaShape(2, 64, 96, 8, 2, 300, 64, 1e-5, 10000.0)
MHA = replace(GQA, num_query_groups=8)
TIED = replace(GQA, tie_word_embeddings=True)
LLAMA3 = replace(TIED, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), rotary_base=500000.0)
SHAPES = {"gqa": GQA, "mha": MHA, "tied": TIED, "llama3": LLAMA3}
SMALL = Resources(jobs=1, max_memory=20_000)  # every matrix takes several blocks
F32, F16, BF16, Q8_0 = (GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))


def gguf(folder: Path, shape: LlamaShape = GQA, **changes: Any) -> Path:
    """A file of a model with random weights."""
    folder.mkdir(exist_ok=True)
    return write_gguf(folder / "model.gguf", shape, tensors_of(shape, weights_of(shape)), **changes)


def converted(source: Path, dtype: DType | None = None) -> Path:
    """The Hugging Face folder made from a file."""
    convert(source, source.with_name("hf"), Wish(Kind.HUGGINGFACE, dtype=dtype), SMALL)
    return source.with_name("hf")


def state(folder: Path, **arguments: Any) -> Mapping[str, Tensor]:
    """The weights that transformers loads."""
    loaded: Mapping[str, Tensor] = AutoModelForCausalLM.from_pretrained(folder, **arguments).state_dict()
    return loaded


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_comes_back_to_the_bit(tmp_path: Path, shape: str) -> None:
    folder = converted(gguf(tmp_path, SHAPES[shape]))
    want, got = weights_of(SHAPES[shape]), open_weights(folder)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    assert read_shape(folder) == SHAPES[shape]
    model, report = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32


def test_a_wrong_order_of_rows_would_be_seen(tmp_path: Path) -> None:
    """Negative control: without llama.cpp's permutation, or with the queries' number of heads for the keys."""
    tensors = tensors_of(GQA, weights_of(GQA))
    assert not np.array_equal(tensors["blk.0.attn_q.weight"], weights_of(GQA)["model.layers.0.self_attn.q_proj.weight"])
    many = tensors_of(replace(GQA, num_query_groups=4), weights_of(GQA))
    assert not np.array_equal(tensors["blk.0.attn_k.weight"], many["blk.0.attn_k.weight"])


@pytest.mark.parametrize("kind", [F16, BF16], ids=lambda kind: kind.name)
def test_16_bits_are_kept_or_widened_without_loss(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    source = gguf(tmp_path, kind=kind)
    dtype = torch.float16 if kind is F16 else torch.bfloat16
    got = open_weights(converted(source))
    assert all(torch.equal(tensor.to(dtype), got[name]) for name, tensor in weights_of(GQA).items())
    record = read_record(tmp_path / "hf")
    assert record.dtype == str(dtype).removeprefix("torch.") and record.source_formats == {kind.name: 16, "F32": 5}
    (tmp_path / "hf").rename(tmp_path / "kept")
    wide = open_weights(converted(source, DType.FLOAT32))
    assert all(
        torch.equal(tensor if tensor.ndim == 1 else tensor.to(dtype).float(), wide[name])
        for name, tensor in weights_of(GQA).items()
    )


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_quantised_weights_equal_transformers(tmp_path: Path, shape: str) -> None:
    source = gguf(tmp_path, SHAPES[shape], kind=Q8_0)
    got, want = state(converted(source)), state(tmp_path, gguf_file=source.name, dtype=torch.float32)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    for name, exact in weights_of(SHAPES[shape]).items():
        assert (got[name] - exact).abs().max() <= exact.abs().max() / 127, "half a step of the coarsest block"
    assert read_record(tmp_path / "hf").dtype == "float32"


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_blocks_of_256_equal_transformers(tmp_path: Path, kind: str) -> None:
    """Random blocks, since the library does not quantise these types; the scales are set to 1/64."""
    shape = LlamaShape(1, 256, 256, 4, 2, 300, 64, 1e-5, 10000.0, tie_word_embeddings=True)
    tensors, scales = tensors_of(shape, weights_of(shape)), {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]
    size = {"Q4_K": 144, "Q6_K": 210}[kind]
    generator = np.random.default_rng(0)
    for name, array in tensors.items():
        if array.ndim == 2:
            blocks = generator.integers(0, 256, (len(array), size), np.uint8)
            for at in scales:
                blocks[:, at : at + 2] = np.frombuffer(struct.pack("<e", 1 / 64), np.uint8)
            tensors[name] = blocks
    source = write_gguf(tmp_path / "model.gguf", shape, tensors, GGMLQuantizationType[kind])
    got, want = state(converted(source)), state(tmp_path, gguf_file=source.name, dtype=torch.float32)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    source = gguf(tmp_path, kind=Q8_0)
    rounded = open_weights(converted(source, DType.BFLOAT16))
    (tmp_path / "hf").rename(tmp_path / "rounded")
    exact = open_weights(converted(source))
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)


def test_other_kinds_and_several_processes(tmp_path: Path) -> None:
    """A file goes through the same loops as every source: straight to a split one, by two processes."""
    source = gguf(tmp_path, kind=Q8_0)
    convert(source, tmp_path / "engine", Wish(Kind.TRTLLM, tp=2, dtype=DType.FLOAT16), Resources(jobs=2))
    assert (tmp_path / "engine/tokenizer.json").is_file()
    assert prove(source, tmp_path / "engine").xxh3 == prove(source, converted(source, DType.FLOAT16)).xxh3


def test_a_proof(tmp_path: Path) -> None:
    source = gguf(tmp_path, LLAMA3, kind=Q8_0)
    folder = converted(source)
    with pytest.raises(ValueError, match=r"hf was converted and not verified: srlm convert verify .*model\.gguf"):
        check_verified(folder)
    prove(source, folder).save()
    check_verified(folder)
    assert compare_logits(source, folder).kl == 0
    assert prove(folder, source).destination_kind == "gguf"
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(ValueError, match=r"hf is not .*model\.gguf: model\.norm\.weight differ"):
        prove(source, folder)


@pytest.mark.parametrize("dim", [8, 64, 128])
def test_llama_3s_scaling_is_recovered(dim: int) -> None:
    for scaling in (RopeScaling(8, 1, 4, 8192), RopeScaling(32, 1, 4, 8192), RopeScaling(4, 1, 4, 2048)):
        factors = rope_freqs(scaling, dim, 500000.0).astype(np.float64)
        found = recover_rope_scaling(factors, 500000.0)
        assert found is not None and np.allclose(rope_freqs(found, dim, 500000.0), factors, rtol=2e-5)
        assert found == scaling or (dim, scaling.factor) == (8, 4), "four factors of which none is between have many"


def test_scalings_nobody_published() -> None:
    """Two numbers are fitted; all three of them may have a common factor, which changes nothing."""
    for scaling in (RopeScaling(6, 1, 3, 1000), RopeScaling(5.5, 2, 6, 3000)):
        found = recover_rope_scaling(rope_freqs(scaling, 128, 10000.0).astype(np.float64), 10000.0)
        assert found is not None and found.factor == scaling.factor
        assert found.high_freq_factor == pytest.approx(scaling.high_freq_factor / scaling.low_freq_factor, rel=1e-3)
        assert np.allclose(rope_freqs(found, 128, 10000.0), rope_freqs(scaling, 128, 10000.0), rtol=2e-5)


@pytest.mark.parametrize("factors", [[1, 2, 1, 4], [0.5, 1, 1, 1], [1, 1, float("nan"), 2], [4, 4, 4, 4]], ids=str)
def test_factors_that_are_not_llama_3s(tmp_path: Path, factors: list[float]) -> None:
    tensors = tensors_of(GQA, weights_of(GQA)) | {"rope_freqs.weight": np.array(factors, np.float32)}
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not Llama 3's stretching of wave lengths"):
        open_checkpoint(write_gguf(tmp_path / "model.gguf", GQA, tensors))


def test_factors_of_1_are_no_scaling(tmp_path: Path) -> None:
    tensors = tensors_of(GQA, weights_of(GQA)) | {"rope_freqs.weight": np.ones(4, np.float32)}
    assert open_checkpoint(write_gguf(tmp_path / "model.gguf", GQA, tensors)).shape == GQA


def test_keys_that_files_leave_out(tmp_path: Path) -> None:
    absent = dict.fromkeys(("attention.head_count_kv", "rope.freq_base", "rope.dimension_count", "vocab_size"))
    assert open_checkpoint(gguf(tmp_path, MHA, model=absent)).shape == MHA


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, r"model\.gguf: its architecture is 'qwen2', supported is 'llama': use a Llama"),
        ({"architecture": "gemma"}, r"its architecture is 'gemma'"),
        ({"model": {"block_count": None}}, r"llama\.block_count is missing"),
        ({"model": {"attention.head_count": 0}}, r"llama\.attention\.head_count is 0, and should be a positive"),
        ({"model": {"attention.head_count_kv": [2, 2]}}, r"llama\.attention\.head_count_kv is a list of values"),
        ({"model": {"attention.head_count": 7}}, r"hidden_size 64 is not divisible by num_attention_heads 7"),
        ({"model": {"expert_count": 8}}, r"llama\.expert_count is 8, supported is 0: use a plain Llama"),
        ({"model": {"rope.scaling.type": "yarn"}}, r"llama\.rope\.scaling\.type is 'yarn', supported is 'none'"),
        ({"model": {"rope.dimension_count": 4}}, r"llama\.rope\.dimension_count is 4, supported is 8"),
        ({"model": {"attention.key_length": 16}}, r"llama\.attention\.key_length is 16, supported is 8"),
        ({"model": {"feed_forward_length": 64}}, r"ffn_gate\.weight has shape \[96, 64\], by its config .* \[64, 64\]"),
        ({"model": {"block_count": 1}}, r"holds 9 tensors that a plain Llama has not \(blk\.1\.attn_k\.weight, "),
        ({"model": {"block_count": 3}}, r"has no tensor blk\.2\.attn_norm\.weight"),
        ({"tokenizer": {"model": "bert", "tokens": ["a"]}}, r"the tokenizer's model is 'bert', supported are 'gpt2' "),
        ({"tokenizer": {"model": "no_vocab"}}, r"holds no tokenizer \(tokenizer\.ggml\.model and tokens\)"),
        ({"tokenizer": tokenizer_metadata(301)}, r"the tokenizer has 301 tokens, the model 300"),
    ],
    ids=lambda case: str(case)[:40] if isinstance(case, dict) else "",
)
def test_other_models_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = gguf(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        converted(source)
    assert not list(tmp_path.glob("hf*")), "nothing is written"


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.attn_q.weight", "output_norm.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = tensors_of(GQA, weights_of(GQA))
    del tensors[name]
    with pytest.raises(ValueError, match=rf"model\.gguf has no tensor {name}, and a Llama has: download"):
        converted(write_gguf(tmp_path / "model.gguf", GQA, tensors))


def test_unknown_tensors_are_named(tmp_path: Path) -> None:
    bias = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    source = write_gguf(tmp_path / "model.gguf", GQA, tensors_of(GQA, weights_of(GQA)) | bias)
    with pytest.raises(ValueError, match=r"holds 1 tensors that a plain Llama has not \(blk\.0\.attn_q\.bias\)"):
        converted(source)


def test_a_type_that_cannot_be_decoded(tmp_path: Path) -> None:
    shape = LlamaShape(1, 256, 256, 4, 2, 300, 64, 1e-5, 10000.0)
    tensors = tensors_of(shape, weights_of(shape))
    matrices = {name: np.zeros((len(array), 292), np.uint8) for name, array in tensors.items() if array.ndim == 2}
    source = write_gguf(tmp_path / "model.gguf", shape, tensors | matrices, GGMLQuantizationType.Q8_K)
    with pytest.raises(ValueError, match=r"token_embd\.weight is of type Q8_K, which the Python library gguf cannot"):
        converted(source)


def test_a_split_model_is_refused(tmp_path: Path) -> None:
    whole = gguf(tmp_path)
    part = tmp_path / "model-00001-of-00003.gguf"
    part.write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match=r"00003\.gguf is one of 3 parts of a model: join them \(llama-gguf-split"):
        converted(part)
    only = tmp_path / "model-00001-of-00001.gguf"
    only.write_bytes(whole.read_bytes())
    assert open_checkpoint(only).shape == GQA


def test_a_part_under_another_name(tmp_path: Path) -> None:
    content = gguf(tmp_path).read_bytes()
    key = b"split.count"
    count = struct.pack("<Q", len(key)) + key + struct.pack("<IH", 2, 4)  # type 2 is uint16
    version, tensors, values = struct.unpack_from("<IQQ", content, 4)
    (tmp_path / "model.gguf").write_bytes(
        content[:4] + struct.pack("<IQQ", version, tensors, values + 1) + count + content[24:]
    )
    with pytest.raises(ValueError, match=r"model\.gguf is one of 4 parts of a model"):
        converted(tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", [F32, Q8_0], ids=lambda kind: kind.name)
def test_a_truncated_file(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    """Cut anywhere, in the header or in the weights, it is refused as what it is."""
    source = gguf(tmp_path, kind=kind)
    content = source.read_bytes()
    for size in (5, 23, 40, 1000, 8000, len(content) // 2, len(content) - 300):
        source.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.gguf is truncated"):
            converted(source)


@pytest.mark.parametrize("content", [b"", b"GGU", b"\x80\x02}q\x00.", b"{}"], ids=str)
def test_not_a_gguf_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.gguf is not a GGUF file: it does not begin with GGUF"):
        converted(tmp_path / "model.gguf")


@pytest.mark.parametrize("version", [struct.pack("<I", 1), struct.pack(">I", 3)], ids=["1", "big-endian"])
def test_old_and_foreign_files(tmp_path: Path, version: bytes) -> None:
    source = gguf(tmp_path)
    source.write_bytes(b"GGUF" + version + source.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"version 0x\d+, supported are \(2, 3\) in little-endian order"):
        converted(source)


def test_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    tensors = tensors_of(GQA, weights_of(GQA))
    tensors["blk.1.ffn_up.weight"][3, 5] = np.nan
    source = write_gguf(tmp_path / "model.gguf", GQA, tensors, F16)
    with pytest.raises(
        ValueError, match=r"model\.gguf: model\.layers\.1\.mlp\.up_proj\.weight holds values that are not"
    ):
        converted(source)


def test_the_command(srlm: Path, tmp_path: Path) -> None:
    source, out = gguf(tmp_path, kind=Q8_0), tmp_path / "out"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(srlm), "convert", *words], capture_output=True, text=True, check=False)

    done = run(str(source), str(out), "--to", "huggingface")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{out}: huggingface, float32, {prove(source, out).num_bytes:,} bytes",
        "dequantised to float32: 16 Q8_0 tensors",
    ]
    record = json.loads((out / "conversion.json").read_text())
    assert record["source_kind"] == "gguf" and record["source_formats"] == {"Q8_0": 16, "F32": 5}
    assert run("verify", str(source), str(out)).returncode == 0 and (out / "proof.json").is_file()
    refused = run(str(out / "config.json"), str(tmp_path / "again"), "--to", "huggingface")
    assert refused.returncode == USER_ERROR and refused.stderr.count("\n") == 1, refused.stderr
    assert refused.stderr.startswith(f"error: {out}/config.json is not a GGUF file")


def test_prompts_calibrate_folders_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.gguf is gguf, and prompts calibrate .*: convert it to one first"):
        activation_ranges(gguf(tmp_path), tmp_path / "prompts.jsonl")


def test_metadata_of_the_tests_is_complete(tmp_path: Path) -> None:
    """Every key that the tests write is one that the conversion reads or checks, apart from the vocabulary's size."""
    for key in set(metadata_of(GQA)) - {"vocab_size"}:
        with pytest.raises(ValueError, match=r"model\.gguf"):
            converted(gguf(tmp_path, MHA, model={key: [1, 1]}))
