"""From one Hugging Face folder to another: the config's own keys, the files that are not weights, several dtypes."""

import json
import os
from pathlib import Path

import pytest
import torch
from llama_folders import save_model
from safetensors.torch import load_file, save_file
from test_convert import SMALL, there
from typer.testing import CliRunner

from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert, read_record
from srlm_mega.checkpoints_conversion.verify import prove
from srlm_mega.cli.main import app

OWN = {
    "use_cache": False,
    "pretraining_tp": 1,
    "mine": {"a": [1, None]},
    "rope_scaling": None,
    "bos_token_id": 5,
    "quantization_config": None,
}


def with_config(folder: Path, **keys: object) -> Path:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | keys))
    return folder


@pytest.mark.parametrize("middle", [None, Kind.MEGATRON, Kind.TRTLLM])
def test_the_config_keeps_its_own_keys(tmp_path: Path, middle: Kind | None) -> None:
    source = with_config(save_model(tmp_path / "model"), **OWN, dtype="float32", torch_dtype="float32")
    wanted = json.loads((source / "config.json").read_bytes())
    via = source if middle is None else there(source, tmp_path / "middle", middle, dtype=DType.BFLOAT16)
    found = json.loads(
        (there(via, tmp_path / "out", Kind.HUGGINGFACE, dtype=DType.BFLOAT16) / "config.json").read_bytes()
    )
    assert wanted | {"dtype": "bfloat16", "torch_dtype": "bfloat16"} == {key: found[key] for key in wanted}


def test_a_config_of_a_quantization_that_the_folder_has_not(tmp_path: Path) -> None:
    source = with_config(save_model(tmp_path / "model"), quantization_config={"quant_method": "fp8"})
    out = there(source, tmp_path / "out", Kind.HUGGINGFACE)
    assert "quantization_config" not in json.loads((out / "config.json").read_bytes())
    assert read_record(out).left_out == ["quantization_config of config.json"]


def test_files_that_are_not_weights_go_along_and_others_are_named(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    kept = ["README.md", "LICENSE", "USE_POLICY.md", "modeling_mine.py", "merges.txt", "trainer_state.json",
            ".gitattributes", "training_args.bin", "original/params.json", "figures/a/loss.png"]  # fmt: skip
    left_out = ["pytorch_model.bin", "pytorch_model.bin.index.json", "original/consolidated.00.pth", "onnx/model.onnx",
                "model.gguf", "tf_model.h5", "other.safetensors", "Model-Q8_0.GGUF", "coreml/weight.bin", "model.nemo",
                "onnx/model.onnx.data", "model-00001-of-00002.safetensors.incomplete", "dist/__0_0.distcp",
                "pytorch_lora_weights.bin"]  # fmt: skip
    for name in kept + left_out + [".git/objects/pack", "proof.json"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"this is {name}")
    os.symlink("nothing", source / "NOTICE")
    os.mkfifo(source / "pipe")
    (source / "figure.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    (source / "proof.json").unlink()
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "--to", "huggingface"])
    assert done.exit_code == 0, done.output
    assert all((tmp_path / "out" / name).read_text() == f"this is {name}" for name in kept)
    (said,) = [line for line in done.output.splitlines() if line.startswith("left out: ")]
    for name in left_out:
        assert f"{name} (weights)" in said and not (tmp_path / "out" / name).exists()
    for words in (
        ".git/ (hidden)",
        "NOTICE (a link to nothing)",
        "pipe (not readable)",
        "figure.png (a Git LFS pointer",
    ):
        assert words in said
    assert "config.json" not in said and "tokenizer" not in said
    tokenizer = {path.name for path in source.glob("tokenizer*")}
    assert tokenizer <= {path.name for path in (tmp_path / "out").iterdir()}
    assert prove(source, tmp_path / "out").source == str(source)


def test_unused_tensors_are_named(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, name: torch.ones(2)}, source / "model.safetensors", metadata={"format": "pt"})
    assert read_record(there(source, tmp_path / "out", Kind.HUGGINGFACE)).left_out == [f"1 unused tensors ({name})"]


@pytest.mark.parametrize("kind", [Kind.HUGGINGFACE, Kind.MEGATRON, Kind.TRTLLM])
def test_several_dtypes_are_cast_when_one_is_chosen(tmp_path: Path, kind: Kind) -> None:
    source = save_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    mixed = {name: value if "norm" in name else value.bfloat16() for name, value in tensors.items()}
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"are of bfloat16, float32 \(16, 5 matrices\): choose one, --dtype float32"):
        convert(source, tmp_path / "refused", Wish(kind), SMALL)
    out = tmp_path / "out"
    convert(source, out, Wish(kind, dtype=DType.BFLOAT16), SMALL)
    assert prove(source, out).dtype == "bfloat16"
    back = load_file(there(out, tmp_path / "back", Kind.HUGGINGFACE) / "model.safetensors")
    assert all(torch.equal(value, mixed[name].bfloat16()) for name, value in back.items())
    if kind is not Kind.TRTLLM:
        wide = load_file(there(source, tmp_path / "wide", Kind.HUGGINGFACE, dtype=DType.FLOAT32) / "model.safetensors")
        assert all(torch.equal(value, mixed[name].float()) for name, value in wide.items())


def test_megatrons_names_of_the_options(tmp_path: Path) -> None:
    words = ["convert", str(save_model(tmp_path / "model")), str(tmp_path / "out"), "--to", "megatron"]
    done = CliRunner().invoke(app, [*words, "--tensor-model-parallel-size=2", "--pipeline-model-parallel-size", "1"])
    assert done.exit_code == 0, done.output
    assert read_record(tmp_path / "out/release").tp == 2
    assert len(list((tmp_path / "out/release").glob("*.distcp"))) == 2
