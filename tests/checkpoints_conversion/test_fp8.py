"""FP8: codes and scales worked out by hand and by torch, both kinds of folders, and what a proof sees of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import GQA, SMALL, model, no_waiting_for_the_disk
from torch import Tensor

from srlm_mega.checkpoints_conversion.bar import no_bar
from srlm_mega.checkpoints_conversion.bits import Bits, DType
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert, read_record
from srlm_mega.checkpoints_conversion.fp8 import Amax, Quantizer, Rounding, group_of, linear_names, outgrown
from srlm_mega.checkpoints_conversion.huggingface import open_weights
from srlm_mega.checkpoints_conversion.logits import compare_logits
from srlm_mega.checkpoints_conversion.verify import prove

__all__ = ["no_waiting_for_the_disk"]
AMAX = Amax(4, {name: 1.0 + number / 8 for number, name in enumerate(linear_names(GQA))})


def fp8(tmp_path: Path, kind: Kind, tp: int = 1, name: str = "fp8") -> Path:
    """A model in FP8; the 16-bit one is beside it."""
    source = tmp_path / "model"
    if not source.exists():
        model(source)
    convert(source, tmp_path / name, Wish(kind, tp, amax=AMAX), SMALL, no_bar)
    return tmp_path / name


def as_bits(tensor: Tensor) -> Bits:
    """The bits of a 16-bit tensor."""
    return tensor.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [(DType.BFLOAT16, torch.bfloat16), (DType.FLOAT16, torch.float16)])
@pytest.mark.parametrize("rounding", list(Rounding))
def test_codes_are_torchs(dtype: DType, torch_dtype: torch.dtype, rounding: Rounding) -> None:
    numbers = torch.randn(300, 257, generator=torch.Generator().manual_seed(0)).to(torch_dtype)
    scale = float(numbers.abs().max().float() / 448)
    scaled = numbers.float() / scale
    want = (scaled if rounding is Rounding.DIRECT else scaled.to(torch_dtype)).to(torch.float8_e4m3fn)
    codes = Quantizer(rounding)(as_bits(numbers), dtype, scale)
    assert np.array_equal(codes, want.view(torch.uint8).numpy())
    other = Quantizer(Rounding.BY_16_BITS if rounding is Rounding.DIRECT else Rounding.DIRECT)
    differing = np.mean(other(as_bits(numbers), dtype, scale) != codes)
    assert differing < 0.02 and (dtype is DType.FLOAT16 or differing > 0)  # the two roundings are not the same


@pytest.mark.parametrize(("dtype", "torch_dtype"), [(DType.BFLOAT16, torch.bfloat16), (DType.FLOAT16, torch.float16)])
def test_codes_of_all_numbers(dtype: DType, torch_dtype: torch.dtype) -> None:
    """Every number of the format that a scale of 1/7 takes to at most 448, ties and subnormals among them."""
    bits = np.arange(1 << 16).astype(np.uint16)
    scaled = torch.from_numpy(bits.view(np.int16)).view(torch_dtype).float() / np.float32(1 / 7)
    fits = (scaled.abs() <= 448).numpy()
    want = scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    codes = Quantizer(Rounding.DIRECT)(bits, dtype, float(np.float32(1 / 7)))
    assert fits.sum() > 30_000 and np.array_equal(codes[fits], want[fits])


def test_codes_by_hand() -> None:
    """Scale 1: 1 is 0 0111 000, 1.125 the next; 1.0625 lies between and goes to the even one; 448 is the largest."""
    numbers = torch.tensor([1.0, 1.125, 1.0625, 448.0, -1.0, 0.0], dtype=torch.bfloat16)
    codes = Quantizer(Rounding.DIRECT)(as_bits(numbers), DType.BFLOAT16, 1.0)
    assert codes.tolist() == [0x38, 0x39, 0x38, 0x7E, 0xB8, 0x00]


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_engine_checkpoint(tmp_path: Path, tp: int) -> None:
    folder = fp8(tmp_path, Kind.TRTLLM, tp)
    weights = open_weights(tmp_path / "model")
    q, k, v = (weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    gate, up = (weights[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    scale = max(part.abs().max().float() for part in (q, k, v)) / 448
    ffn_scale = max(part.abs().max().float() for part in (gate, up)) / 448
    for rank in range(tp):
        got = load_file(folder / f"rank{rank}.safetensors")
        attention, mlp = "transformer.layers.1.attention.", "transformer.layers.1.mlp."
        queries = (q.float().chunk(tp)[rank] / scale).to(torch.float8_e4m3fn)
        assert torch.equal(got[attention + "qkv.weight"][: len(queries)].view(torch.uint8), queries.view(torch.uint8))
        ups = (up.float().chunk(tp)[rank] / ffn_scale).to(torch.float8_e4m3fn)
        assert torch.equal(got[mlp + "gate.weight"].view(torch.uint8), ups.view(torch.uint8))
        assert got[attention + "qkv.weights_scaling_factor"] == scale
        assert got[mlp + "fc.weights_scaling_factor"] == got[mlp + "gate.weights_scaling_factor"] == ffn_scale
        # Layer 1 has the amax of numbers 7 to 13, q k v o gate up down: 1 + 9/8 is the largest of qkv.
        assert got[attention + "qkv.activation_scaling_factor"] == torch.tensor([2.125]) / 448
        assert got[mlp + "proj.activation_scaling_factor"] == torch.tensor([1 + 13 / 8]) / 448
        assert got[attention + "kv_cache_scaling_factor"] == 1
        assert got["lm_head.weight"].dtype == got["transformer.ln_f.weight"].dtype == torch.bfloat16
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    assert quantization == {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    assert read_record(folder).is_fp8


def test_unified_folder(tmp_path: Path) -> None:
    got = load_file(fp8(tmp_path, Kind.HUGGINGFACE) / "model.safetensors")
    weights = open_weights(tmp_path / "model")
    prefix = "model.layers.2.self_attn."
    parts = {name: weights[f"{prefix}{name}_proj.weight"] for name in "qkv"}
    scale = max(part.abs().max().float() for part in parts.values()) / 448
    for name, part in parts.items():
        want = (part.float() / scale).bfloat16().to(torch.float8_e4m3fn)
        assert torch.equal(got[f"{prefix}{name}_proj.weight"].view(torch.uint8), want.view(torch.uint8))
        assert got[f"{prefix}{name}_proj.weight_scale"] == scale
    assert got[f"{prefix}k_proj.k_scale"] == got[f"{prefix}v_proj.v_scale"] == 1
    assert f"{prefix}q_proj.q_scale" not in got and got["lm_head.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "fp8/config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "FP8" and config["rope_theta"] == 10000.0
    assert json.loads((tmp_path / "fp8/hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "FP8"


@pytest.mark.parametrize(("kind", "tp"), [(Kind.TRTLLM, 2), (Kind.HUGGINGFACE, 1)])
def test_proofs_of_fp8(tmp_path: Path, kind: Kind, tp: int) -> None:
    folder = fp8(tmp_path, kind, tp)
    assert prove(tmp_path / "model", folder, no_bar).num_tensors == 39
    logits = compare_logits(tmp_path / "model", folder)
    assert 0 < logits.kl < logits.control_kl / 10
    file = folder / ("rank1.safetensors" if kind is Kind.TRTLLM else "model.safetensors")
    tensors, good = load_file(file), file.read_bytes()
    module = "transformer.layers.1.mlp.proj" if kind is Kind.TRTLLM else "model.layers.1.mlp.down_proj"
    scale = f"{module}.weights_scaling_factor" if kind is Kind.TRTLLM else f"{module}.weight_scale"
    save_file(tensors | {scale: tensors[scale] * 2}, file)
    with pytest.raises(ValueError, match=r"down_proj\.weight"):
        prove(tmp_path / "model", folder, no_bar)
    codes = tensors[f"{module}.weight"].view(torch.uint8).clone()
    codes[3, 3] ^= 1
    file.write_bytes(good)
    save_file(tensors | {f"{module}.weight": codes.view(torch.float8_e4m3fn)}, file)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight differ"):
        prove(tmp_path / "model", folder, no_bar)
    del tensors[scale]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"has no fp32 number .*, and the weight it belongs to is FP8"):
        prove(tmp_path / "model", folder, no_bar)


def test_what_fp8_is_not_for(tmp_path: Path) -> None:
    folder = fp8(tmp_path, Kind.TRTLLM)
    with pytest.raises(ValueError, match=r"is FP8, which is not undone"):
        convert(folder, tmp_path / "back", Wish(Kind.HUGGINGFACE), SMALL, no_bar)
    with pytest.raises(ValueError, match=r"--fp8 is for huggingface and trtllm"):
        convert(tmp_path / "model", tmp_path / "back", Wish(Kind.MEGATRON, amax=AMAX), SMALL, no_bar)
    model(tmp_path / "fp32", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"FP8 is made of 16-bit weights"):
        convert(tmp_path / "fp32", tmp_path / "back", Wish(Kind.TRTLLM, amax=AMAX), SMALL, no_bar)


def test_amax_files(tmp_path: Path) -> None:
    path = tmp_path / "amax.json"
    AMAX.save(path)
    assert Amax.load(path, GQA) == AMAX
    with pytest.raises(ValueError, match=r"amax\.json is not of this model: model\.layers\.3"):
        Amax.load(path, replace(GQA, num_layers=3))
    Amax(1, AMAX.inputs | {"model.layers.0.mlp.up_proj": 0.0}).save(path)
    with pytest.raises(ValueError, match=r"up_proj has 0\.0: calibrate again"):
        Amax.load(path, GQA)


def test_a_probe_outgrows_a_calibration() -> None:
    name = "model.layers.2.self_attn.o_proj"
    probe = Amax(1, {key: value * 1.05 for key, value in AMAX.inputs.items()} | {name: AMAX.inputs[name] * 1.5})
    assert outgrown(AMAX, probe, margin=1.1) == {name: pytest.approx(1.5)}
    assert outgrown(AMAX, AMAX, margin=1.0) == {}
    assert group_of(name) == (2, "o")
