"""stories260K, a model that somebody trained, on Megatron at TP 1, 2 and 4 against transformers: one launch."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import twin
from llama2c import convert
from safetensors.torch import load_file
from stories import ONCE_UPON_A_TIME, restored
from stories_run import NUM_NEW_TOKENS, TENSOR_PARALLEL_SIZES, WORLD_SIZE, config, read_pairs
from torch import Tensor
from transformers import LlamaForCausalLM

from srlm_mega.checkpoints_conversion.huggingface import open_weights, write_folder

pytestmark = [pytest.mark.slow, pytest.mark.extra]
TOLERANCE = 1e-4
LAYOUTS = [f"TP{tp}" for tp in TENSOR_PARALLEL_SIZES]
PROMPT = ONCE_UPON_A_TIME[:5]


@pytest.fixture(scope="module")
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in Hugging Face's layout."""
    root = tmp_path_factory.mktemp("stories")
    write_folder(
        root / "start",
        *convert(restored(shared_data / "stories260K.bin", root / "stories260K.bin")),
        tokenizer_from=None,
    )
    return root / "start"


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    """The model in transformers."""
    torch.set_num_threads(1)  # threads cost more than they bring on a model this small
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def wrong_model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    """Negative control: gate and up of one layer in each other's place."""
    shape, weights = convert(folder.parent / "stories260K.bin")
    gate, up = (f"model.layers.2.mlp.{part}_proj.weight" for part in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]
    target = tmp_path_factory.mktemp("stories") / "wrong"
    write_folder(target, shape, weights, tokenizer_from=None)
    return LlamaForCausalLM.from_pretrained(target)


@pytest.fixture(scope="module")
def pairs_file(model: LlamaForCausalLM, folder: Path) -> Path:
    """Four pairs of the model's own samples: [number of prompt tokens, chosen ids, rejected ids]."""
    torch.manual_seed(0)
    samples = model.generate(
        torch.tensor([PROMPT]), do_sample=True, temperature=1.0, max_new_tokens=24, num_return_sequences=8
    ).tolist()
    pairs = [[len(PROMPT), samples[number][: 20 + number], samples[number + 4]] for number in range(4)]
    file = folder.parent / "pairs.json"
    file.write_text(json.dumps(pairs))
    return file


@pytest.fixture(scope="module")
def results(folder: Path, pairs_file: Path, launch: Callable[..., str]) -> dict[str, Any]:
    """What each layout computed, by its name."""
    out = folder.parent / "out"
    out.mkdir()
    launch(WORLD_SIZE, Path(__file__).parent / "stories_worker.py", folder, pairs_file, out)
    computed: dict[str, Any] = json.loads((out / "results.json").read_text())
    return computed


def logit_difference(result: dict[str, Any], model: LlamaForCausalLM) -> float:
    """Largest difference over the story."""
    got = torch.tensor(result["logits"])
    with torch.no_grad():
        want: Tensor = model(torch.tensor([result["story"][:-1]])).logits[0]
    assert got.shape == want.shape == (NUM_NEW_TOKENS, 512)
    return (got - want).abs().max().item()


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_equal_transformers(
    name: str, results: dict[str, Any], model: LlamaForCausalLM, wrong_model: LlamaForCausalLM
) -> None:
    assert logit_difference(results[name], model) < TOLERANCE
    assert logit_difference(results[name], wrong_model) > 0.1


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_story_is_transformers_story(
    name: str, results: dict[str, Any], model: LlamaForCausalLM, wrong_model: LlamaForCausalLM
) -> None:
    want, other = (
        candidate.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=NUM_NEW_TOKENS)[0].tolist()
        for candidate in (model, wrong_model)
    )
    assert results[name]["story"] == want
    assert want[: len(ONCE_UPON_A_TIME)] == ONCE_UPON_A_TIME
    assert results[name]["story"] != other


def gradient_norm(model: LlamaForCausalLM, pairs_file: Path) -> float:
    """Of the first DPO step, in plain PyTorch: the mean over pairs of -log sigmoid(beta * margin), margins 0.

    Its derivative by a margin is -beta / 2, so the gradient is that of -beta / 2 * mean(log p(y+) - log p(y-)).
    """
    differences = [
        twin.target_logps(model, pair.chosen).sum() - twin.target_logps(model, pair.rejected).sum()
        for pair in read_pairs(pairs_file)
    ]
    loss = -config(1).dpo.beta / 2 * torch.stack(differences).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


@pytest.fixture(scope="module")
def norm(model: LlamaForCausalLM, pairs_file: Path) -> float:
    """What the gradient norm should be."""
    return gradient_norm(model, pairs_file)


@pytest.fixture(scope="module")
def wrong_norm(wrong_model: LlamaForCausalLM, pairs_file: Path) -> float:
    """What it is for the wrong model."""
    return gradient_norm(wrong_model, pairs_file)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_first_dpo_step(name: str, results: dict[str, Any], norm: float, wrong_norm: float) -> None:
    metrics = results[name]["dpo"]
    assert metrics["loss"] == pytest.approx(math.log(2), abs=TOLERANCE)
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=TOLERANCE)
    assert metrics["grad_norm"] == pytest.approx(norm, abs=TOLERANCE)
    assert metrics["grad_norm"] == pytest.approx(results["TP1"]["dpo"]["grad_norm"], abs=TOLERANCE)
    assert abs(metrics["grad_norm"] - wrong_norm) > 10 * TOLERANCE


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_step_was_taken_and_exported(name: str, results: dict[str, Any], folder: Path) -> None:
    """One Adam step of lr 1e-4 moves a weight by at most 1e-4, and most by nearly that."""
    start, trained = open_weights(folder), load_file(folder.parent / f"out/{name}/huggingface/model.safetensors")
    assert trained.keys() == start.keys()
    moved = torch.cat([(trained[key] - start[key]).abs().flatten() for key in start])
    assert moved.max() <= 1.01e-4 and moved.median() > 0.9e-4
