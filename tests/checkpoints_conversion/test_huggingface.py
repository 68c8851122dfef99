"""Model folders: written, read by transformers, read back; and what is wrong with a folder, by file and tensor."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_weights import SHAPE, weights_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_mega.checkpoints_conversion.huggingface import open_weights, read_shape, write_folder

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good model folder, in one file."""
    write_folder(tmp_path / "model", SHAPE, weights_of(), tokenizer_from=None)
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good model folder, in several files."""
    write_folder(tmp_path / "sharded", SHAPE, weights_of(), tokenizer_from=None, max_shard_bytes=10_000)
    return tmp_path / "sharded"


def spoil(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of a one-file folder; None removes one. Dots in names are written as two underscores."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_was_written(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    shape = replace(SHAPE, tie_word_embeddings=tied)
    weights = {name: tensor.to(dtype) for name, tensor in weights_of(shape).items()}
    write_folder(tmp_path, shape, weights, tokenizer_from=None)
    model, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == dtype and model.config.rope_parameters["rope_theta"] == 5000.0
    assert model.config.rms_norm_eps == 1e-6 and model.config.tie_word_embeddings == tied
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_what_transformers_wrote_is_read(tmp_path: Path) -> None:
    """transformers writes its own spelling of the config; logits of what we write from it are the same bits."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE.to_huggingface(), initializer_range=0.3))
    model.save_pretrained(tmp_path / "theirs")
    assert "rope_theta" not in json.loads((tmp_path / "theirs/config.json").read_text())
    shape = read_shape(tmp_path / "theirs")
    assert shape == SHAPE
    write_folder(tmp_path / "ours", shape, open_weights(tmp_path / "theirs"), tokenizer_from=tmp_path / "theirs")
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        want, got = model(tokens).logits, LlamaForCausalLM.from_pretrained(tmp_path / "ours")(tokens).logits
    assert torch.equal(got, want)


def test_round_trip(folder: Path) -> None:
    assert read_shape(folder) == SHAPE
    read, want = open_weights(folder), weights_of()
    assert read.keys() == want.keys() and len(read) == len(want)
    assert all(torch.equal(read[name], want[name]) for name in want)


def test_shards_hold_the_same_model(sharded: Path, folder: Path) -> None:
    files = sorted(file.name for file in sharded.iterdir())
    assert files[:2] == ["config.json", "model-00001-of-00006.safetensors"] and "model.safetensors" not in files
    whole, parts = open_weights(folder), open_weights(sharded)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    total = sum(tensor.nbytes for tensor in weights_of().values())
    assert json.loads((sharded / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == total
    state = LlamaForCausalLM.from_pretrained(sharded).state_dict()
    assert all(torch.equal(state[name], whole[name]) for name in whole)


def test_the_same_weights_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    backwards = dict(reversed(weights_of().items()))
    write_folder(tmp_path / "again", SHAPE, backwards, tokenizer_from=None)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_tokenizer_and_special_ids_go_along(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2), "Llama's, when nothing says otherwise"
    config |= {"bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    write_folder(tmp_path / "next", SHAPE, weights_of(), tokenizer_from=folder)
    assert (tmp_path / "next/tokenizer.json").read_text() == "{}"
    written = json.loads((tmp_path / "next/config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (7, [8, 9], 0)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/config\.json does not exist: .*nowhere is not a Hugging Face"):
        read_shape(tmp_path / "nowhere")


def test_a_folder_without_weights_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model has neither model\.safetensors nor"):
        open_weights(folder)


def test_missing_unknown_and_misshapen_tensors_are_named(folder: Path) -> None:
    spoil(folder, model__norm__weight=None)
    with pytest.raises(ValueError, match=r"model has no tensor model\.norm\.weight"):
        open_weights(folder)
    spoil(folder, model__norm__weight=torch.ones(31))
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.norm\.weight has shape \[31\].*have \[32\]"):
        open_weights(folder)
    spoil(folder, model__norm__weight=torch.ones(32), model__extra=torch.ones(1))
    with pytest.raises(ValueError, match=r"holds unknown tensors: model\.extra"):
        open_weights(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named_when_read(folder: Path, value: float) -> None:
    tensor = weights_of()[UP]
    tensor[3, 5] = value
    spoil(folder, **{UP.replace(".", "__"): tensor})
    weights = open_weights(folder)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {UP} holds 1 values that are not finite"):
        weights[UP]


def test_a_truncated_file_is_named(sharded: Path) -> None:
    file = sharded / "model-00002-of-00006.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model-00002-of-00006\.safetensors is truncated"):
        open_weights(sharded)


def test_an_index_that_lies_is_found_out(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][UP] = "model-00001-of-00006.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"model-00001-of-00006\.safetensors has no tensor {UP}"):
        open_weights(sharded)
    content["weight_map"][UP] = "model-00009-of-00006.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"model-00009-of-00006\.safetensors is missing.* {UP}"):
        open_weights(sharded)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not JSON"):
        open_weights(sharded)


def test_broken_weights_are_not_written(tmp_path: Path) -> None:
    good, target = weights_of(), tmp_path / "bad"
    for wrong, message in (
        (good | {UP: good[UP] * float("nan")}, rf"{UP} holds 768 values that are not finite"),
        (good | {UP: good[UP][:-1]}, rf"{UP} has shape \[23, 32\]"),
        (
            good | {UP: good[UP].bfloat16()},
            r"are of torch\.float32 and torch\.bfloat16 .*: give them one dtype",
        ),
        ({name: good[name] for name in good if name != UP}, rf"the model to write has no tensor {UP}"),
    ):
        with pytest.raises(ValueError, match=message):
            write_folder(target, SHAPE, wrong, tokenizer_from=None)
        assert not (target / "config.json").exists(), "a folder without config.json is no model"
