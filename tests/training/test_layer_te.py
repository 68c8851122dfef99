"""Transformer Engine's layers, built, saved and resumed by its own Python on a CPU (engine_worker.py): no GPU has run
them. Both ends of the versions that megatron-core 0.16.1 asks for are tried, and the newest version of all."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_packages import ENDS, NEWEST, engine_packages
from places import ROOT

Found = dict[str, Any]
VERSIONS = (ENDS[1], *(pytest.param(version, marks=pytest.mark.extra) for version in (ENDS[0], NEWEST)))
WORKER = Path(__file__).with_name("engine_worker.py")
NORMS = ("linear_qkv.layer_norm_weight", "linear_fc1.layer_norm_weight", "final_layernorm.weight")
# Out, in, of which TP divides: heads 8, groups 4, head size 16; fc1 is gate and up.
SHAPES = {
    "self_attention.linear_qkv.weight": ((8 + 2 * 4) * 16, 128, "out"),
    "self_attention.linear_proj.weight": (128, 8 * 16, "in"),
    "mlp.linear_fc1.weight": (2 * 256, 128, "out"),
    "mlp.linear_fc2.weight": (128, 256, "in"),
}


@pytest.fixture(scope="module", params=VERSIONS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    """What the worker found with one version."""
    out = tmp_path_factory.mktemp("engine")
    path = os.pathsep.join(map(str, (engine_packages(request.param), ROOT / "tests/support", ROOT)))
    quiet = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(out)],
        env=os.environ | quiet | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: Found = json.loads((out / "found.json").read_text())
    assert found["version"] == request.param
    yield found


def test_shapes_in_every_layout(found: Found) -> None:
    """Products are split over tensor ranks where Megatron's are, norms are whole."""
    for name, tp in (("one", 1), ("TP2 x PP2, first", 2), ("TP2 x PP2, last", 2)):
        parameters = found["layouts"][name]["parameters"]
        assert sum(key.startswith("decoder.layers.") for key in parameters) == (24 if tp == 1 else 12)
        for key, (out, columns, split) in SHAPES.items():
            want = [out // tp, columns] if split == "out" else [out, columns // tp]
            assert parameters[f"decoder.layers.1.{key}"]["shape"] == want
        assert all(one["shape"] == [128] for key, one in parameters.items() if key.endswith(NORMS))


def test_every_weight_is_filled(found: Found) -> None:
    """All were NaN; `fill_weights` compares names and shapes with the converter's."""
    for layout in found["layouts"].values():
        assert all(one["filled"] for one in layout["parameters"].values())


def test_gradients_go_to_fp32_buffers(found: Found) -> None:
    """Transformer Engine's products add to them, and tensor ranks sum the norms' under sequence parallelism."""
    for name, layout in found["layouts"].items():
        assert {one["main_grad"] for one in layout["parameters"].values()} == {"torch.float32"}
        products = [layout["modules"][module] for module in ("qkv", "proj", "fc1", "fc2")]
        assert all(one["fuse_wgrad_accumulation"] for one in products)
        summed = {key for key, one in layout["parameters"].items() if one["summed"]}
        assert summed == ({key for key in layout["parameters"] if key.endswith(NORMS)} if name != "one" else set())


def test_what_the_modules_are_told(found: Found) -> None:
    """Llama's: RMSNorm in front of the column-parallel products, no bias, causal attention over query groups."""
    for name, layout in found["layouts"].items():
        tp, told = (1 if name == "one" else 2), layout["modules"]
        for module in ("qkv", "fc1"):
            assert told[module]["base"] == "transformer_engine.pytorch.module.layernorm_linear"
            assert (told[module]["normalization"], told[module]["eps"]) == ("RMSNorm", 1e-5)
        for module, mode in (("qkv", "column"), ("proj", "row"), ("fc1", "column"), ("fc2", "row")):
            assert (told[module]["parallel_mode"], told[module]["use_bias"]) == (mode, False)
            assert (told[module]["tp_size"], told[module]["sequence_parallel"]) == (tp, tp > 1)
        attention = told["attention"]
        assert (attention["num_attention_heads"], attention["num_gqa_groups"], attention["tp_size"]) == (8, 4, tp)
        assert (attention["attn_mask_type"], attention["attention_dropout"]) == ("causal", 0.1)


def test_recipes_are_transformer_engine_s(found: Found) -> None:
    """Each of ours makes the recipe of its name, with our format and history, and its own casts."""
    want = {
        "delayed": ("TEDelayedScaling", 7, "Float8Quantizer"),
        "tensorwise": ("Float8CurrentScaling", None, "Float8CurrentScalingQuantizer"),
        "blockwise": ("Float8BlockScaling", None, "Float8BlockQuantizer"),
        "mxfp8": ("MXFP8BlockScaling", None, "MXFP8Quantizer"),
    }
    assert found["recipes"] == {
        ours: {"recipe": theirs, "format": "HYBRID", "history": history, "quantizers": [quantizer]}
        for ours, (theirs, history, quantizer) in want.items()
    }


def test_a_checkpoint_has_the_same_tensors_for_both_kinds_of_layer(found: Found) -> None:
    for layout in found["layouts"].values():
        assert layout["saved"]["torch"] == layout["saved"]["engine"]
        assert any("layer_norm_weight" in key for key in layout["saved"]["torch"])


@pytest.mark.parametrize("saver", ["torch", "engine", "engine, delayed"])
@pytest.mark.parametrize("loader", ["torch", "engine", "engine, delayed"])
def test_a_checkpoint_resumes_with_either_kind_of_layer(found: Found, saver: str, loader: str) -> None:
    """Weights and moments come back; delayed scales too, where they were saved, and start anew elsewhere, which one
    line says."""
    resumed = found["checkpoints"][f"{saver} -> {loader}"]
    anew = saver == "torch" and loader != "torch"
    assert resumed == {
        "step": 3,
        "same": True,
        "printed": "iter_0000003 has no state of Transformer Engine's layers: FP8 scales start anew\n" if anew else "",
        "history": 0.5 if saver == "engine, delayed" and loader != "torch" else None,
    }


def test_a_checkpoint_of_another_model_is_refused(found: Found) -> None:
    said = found["checkpoints"]["another model"]
    assert "iter_0000003 does not fit this model (" in said
    assert "resume with the configuration that wrote it, or remove" in said


def test_what_a_rehearsal_counts_of_a_layer(found: Found) -> None:
    """By hand, in bf16, for one position, hidden h = 128, keys and values g = 64, a = 8 heads, ffn f = 256: the norms'
    results 2 * 2h and one fp32 number each 2 * 4; query 2h, key and value 2 * 2g; attention's result 2h and one fp32
    number per head 4a; both sums with the residual 2 * 2h, and their dropout masks 2 * h; gate and up 4f, SwiGLU's
    result 2f. The norms' inputs are the sums before. Attention keeps the state of its random numbers, 16 bytes."""
    h, g, a, f = 128, 64, 8, 256
    norms, attention = 2 * 2 * h + 2 * 4, 2 * h + 2 * 2 * g + 2 * h + 4 * a
    residual, mlp = 2 * 2 * h + 2 * h, 4 * f + 2 * f
    random_state = 16
    rehearsed = found["rehearsals"]
    assert rehearsed["layer"] == rehearsed["positions"] * (norms + attention + residual + mlp) + random_state
    assert found["rehearsals"]["backend"].startswith("layers: transformer_engine; attention: transformer_engine;")


def test_weight_gradients_are_added_by_the_products(found: Found) -> None:
    """Four weights of 2 and of 3 layers, in an SFT and a DPO step of 2 micro batches each: all in fp32, accumulated."""
    assert found["rehearsals"]["added"] == 4 * (2 + 3) * 2 * 2


def test_it_sends_what_the_torch_layers_send_and_waits_for_nothing(found: Found) -> None:
    """TP 2 x PP 2 with sequence parallelism, the last rank. No layer lets the host wait in a step."""
    messages = found["rehearsals"]["messages"]
    assert messages["torch"] == messages["transformer_engine"]
    assert any(one["axis"] == "TP" for one in messages["torch"])
    in_steps = {one for one in found["rehearsals"]["reads"] if "step" in one}
    assert not any(part in one for one in in_steps for part in ("transformer/", "transformer_engine", "layer_"))


def test_fp8_is_not_rehearsed(found: Found) -> None:
    """Casts and copies of weights are not counted, so it is refused rather than rehearsed without them."""
    assert "rehearse with trainer.fp8=null trainer.first" in found["rehearsals"]["fp8"]
    assert "take from srlm plan what FP8 adds" in found["rehearsals"]["fp8"]
