"""nvidia-modelopt on whole models as the oracle of engine checkpoints, 16 bits and FP8, and of the calibration."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_convert import GQA, model
from torch import Tensor

from srlm_mega.checkpoints_conversion.bar import no_bar
from srlm_mega.checkpoints_conversion.build import Resources
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert
from srlm_mega.checkpoints_conversion.fp8 import GROUPS, Amax, group_of

pytestmark = [
    pytest.mark.extra,
    pytest.mark.skipif(find_spec("modelopt") is None, reason="nvidia-modelopt is not installed"),
]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, ModelOpt's exports of it, and our calibration's `amax.json`. Its vocabulary is odd."""
    root = tmp_path_factory.mktemp("oracle")
    model(root / "model", GQA)
    tokens = torch.randint(GQA.vocab_size, (4, 16), generator=torch.Generator().manual_seed(1)).tolist()
    (root / "prompts.jsonl").write_text("".join(json.dumps({"tokens": line}) + "\n" for line in tokens))
    worker = str(Path(__file__).parent / "modelopt_worker.py")
    done = subprocess.run(
        [sys.executable, worker, str(root / "model"), str(root / "prompts.jsonl"), str(root)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def ours(oracle: Path, out: Path, kind: Kind, tp: int, amax: Amax | None) -> Path:
    """The same by us."""
    convert(oracle / "model", out, Wish(kind, tp, amax=amax), Resources(), no_bar)
    return out


def bits(tensor: Tensor) -> bytes:
    """Of a tensor of any dtype."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("tp", [1, 2])
def test_bf16_engine_checkpoint(oracle: Path, tmp_path: Path, tp: int) -> None:
    out = ours(oracle, tmp_path / "out", Kind.TRTLLM, tp, None)
    for rank in range(tp):
        want, got = (
            load_file(oracle / f"bf16_tp{tp}/rank{rank}.safetensors"),
            load_file(out / f"rank{rank}.safetensors"),
        )
        assert want.keys() == got.keys()
        assert all(want[name].shape == got[name].shape and bits(want[name]) == bits(got[name]) for name in want)
    theirs, config = (json.loads((folder / "config.json").read_text()) for folder in (oracle / f"bf16_tp{tp}", out))
    common = theirs.keys() & config.keys() - {"logits_dtype", "use_parallel_embedding", "rank"}
    assert len(common) > 15 and {key: theirs[key] for key in common} == {key: config[key] for key in common}


def test_the_calibration(oracle: Path) -> None:
    amax = Amax.load(oracle / "amax.json", GQA)
    want = load_file(oracle / "fp8_unified/model.safetensors")
    for linear, value in amax.inputs.items():
        assert torch.equal(torch.tensor(value) / 448, want[f"{linear}.input_scale"]), linear


@pytest.mark.parametrize("tp", [1, 2])
def test_fp8_engine_checkpoint(oracle: Path, tmp_path: Path, tp: int) -> None:
    out = ours(oracle, tmp_path / "out", Kind.TRTLLM, tp, Amax.load(oracle / "amax.json", GQA))
    for rank in range(tp):
        want, got = load_file(oracle / f"fp8_tp{tp}/rank{rank}.safetensors"), load_file(out / f"rank{rank}.safetensors")
        extra = {name for name in want if name.endswith((".k_cache_scaling_factor", ".v_cache_scaling_factor"))}
        assert want.keys() - extra == got.keys()
        wrong = [
            name for name in got if not name.endswith("kv_cache_scaling_factor") and bits(want[name]) != bits(got[name])
        ]
        assert wrong == []


def test_unified_fp8_folder(oracle: Path, tmp_path: Path) -> None:
    """ModelOpt gives queries, keys and values a scale each: the largest of them is ours, and the tensor that has it is
    the same bit for bit. All others are the same anyway."""
    out = ours(oracle, tmp_path / "out", Kind.HUGGINGFACE, 1, Amax.load(oracle / "amax.json", GQA))
    want, got = load_file(oracle / "fp8_unified/model.safetensors"), load_file(out / "model.safetensors")
    assert want.keys() == got.keys()
    scales: dict[tuple[int, str], list[float]] = {}
    equal = 0
    for name in (name for name in got if not name.endswith((".k_scale", ".v_scale"))):
        assert want[name].shape == got[name].shape and want[name].dtype == got[name].dtype, name
        linear = name.rpartition(".")[0]
        has_scale = f"{linear}.weight_scale" in want
        if has_scale:
            scales.setdefault(group_of(linear), []).append(float(want[f"{linear}.weight_scale"]))
        if not has_scale or want[f"{linear}.weight_scale"] == got[f"{linear}.weight_scale"]:
            assert bits(want[name]) == bits(got[name]), name
            equal += name.endswith("proj.weight")
    for layer, group in scales:
        member = GROUPS[group][0]
        assert float(got[f"model.layers.{layer}.{member}.weight_scale"]) == max(scales[layer, group])
    assert equal == 4 * 4  # one of q, k, v, one of gate, up, and o, down in each of four layers
