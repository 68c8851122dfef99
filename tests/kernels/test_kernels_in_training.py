"""Megatron's trainer with the Triton kernels, interpreted: the weight's gradient by way of `main_grad` is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Metrics of two steps, without and with the kernels, of a model with tied embeddings and one without."""
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("training")
    for name in ("plain", "tied"):
        torch.manual_seed(0)
        shape = LlamaConfig(
            num_hidden_layers=4,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=61,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            initializer_range=0.15,
            tie_word_embeddings=name == "tied",
        )
        LlamaForCausalLM(shape).save_pretrained(models / name)
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(tests / "kernels_training_worker.py"), str(models), str(out)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(tests)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    content: dict[str, Any] = json.loads((out / "results.json").read_text())
    return content


def search_path(tests: Path) -> str:
    """Where the worker finds the tiny run of the distributed tests."""
    return os.pathsep.join([str(tests.parent / "distributed"), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.mark.parametrize("model", ["plain", "tied"])
def test_training_is_the_same(results: dict[str, Any], model: str) -> None:
    assert len(results[model]["kernels"]) == 2
    assert largest_difference(results[model]) < 1e-5


def test_a_wrong_gradient_is_seen(results: dict[str, Any]) -> None:
    assert largest_difference(results["wrong"]) > 1e-4


def test_the_kernels_were_used(results: dict[str, Any]) -> None:
    """Their sums run in another order: not all of the last bits are the reference's."""
    assert largest_difference(results["plain"]) > 0


def largest_difference(found: dict[str, Any]) -> float:
    """Of losses and gradient norms; the second loss depends on the first update."""
    return max(
        abs(ours[key] - true[key])
        for ours, true in zip(found["kernels"], found["reference"], strict=True)
        for key in ("loss", "grad_norm")
    )
