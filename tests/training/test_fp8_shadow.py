"""The shadow check, with noise that follows config.fp8 in place of FP8."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core.transformer.module import MegatronModule
from places import TOY
from torch import Tensor

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.config.file import load_config
from srlm_mega.config.training import ParallelConfig
from srlm_mega.errors import CannotContinue
from srlm_mega.training.batch import Batch, TokenSequence, padded_batch
from srlm_mega.training.fp8_recipe import without_fp8
from srlm_mega.training.fp8_shadow import check_shadow, deviation, reward_margins
from srlm_mega.training.model import build_model, transformer_config
from srlm_mega.training.topology import Topology

BETA = 0.1


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with Topology.start(ParallelConfig(), load_config(TOY).trainer, seed=0) as started:
        yield started


@pytest.fixture
def model(topology: Topology) -> list[MegatronModule]:
    """A model whose first layer adds 1% of its output's first half to it, as long as its configuration says FP8."""
    shape = LlamaShape(2, 32, 48, 4, 2, 64, 64, 1e-5, 10000.0, False)
    config = load_config(TOY)
    topology.seed_dropout(0)
    chunks = build_model(transformer_config(shape, config.dpo, config, topology), shape, topology)
    for parameter in chunks[0].parameters():
        parameter.data.mul_(10)  # of the size that training gives them
    layer = chunks[0].decoder.layers[0]

    def perturb(module: MegatronModule, inputs: object, outputs: tuple[Tensor, Tensor | None]) -> object:
        hidden, context = outputs
        return (hidden + 0.01 * hidden.roll(1, -1) if module.config.fp8 else hidden), context

    layer.register_forward_hook(perturb)
    return chunks


def batches() -> list[Batch]:
    """Two micro batches of one pair."""
    lengths = ((7, 9), (12, 5))
    sequences = [[TokenSequence("s", tuple(range(1, length)), 2) for length in pair] for pair in lengths]
    return [padded_batch(pair, 2, 16) for pair in sequences]


def set_fp8(model: list[MegatronModule], to: str | None) -> None:
    for module in model[0].modules():
        if isinstance(module, MegatronModule):
            module.config.fp8 = to


def test_the_difference_is_found(model: list[MegatronModule], topology: Topology) -> None:
    model[0].eval()
    exact = reward_margins(model, batches(), BETA)
    set_fp8(model, "hybrid")
    perturbed = reward_margins(model, batches(), BETA)
    model[0].train()
    assert exact.shape == (2,)
    want = (perturbed - exact).abs().max().item()
    assert check_shadow(model, batches(), BETA, threshold=10.0, topology=topology) == pytest.approx(want)
    assert want > 1e-4
    assert model[0].training


def test_without_a_difference_it_is_zero(model: list[MegatronModule], topology: Topology) -> None:
    """Negative control: the noise follows the configuration, so nothing is found where that does not say FP8."""
    assert check_shadow(model, batches(), BETA, threshold=1e-9, topology=topology) == 0.0


def test_above_the_threshold_the_run_stops(model: list[MegatronModule], topology: Topology) -> None:
    set_fp8(model, "hybrid")
    with pytest.raises(CannotContinue, match="more than fp8_shadow_threshold 1e-06"):
        check_shadow(model, batches(), BETA, threshold=1e-6, topology=topology)
    assert model[0].training


def test_a_nan_stops_too(model: list[MegatronModule], topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srlm_mega.training.fp8_shadow.reward_margins", lambda *_: torch.tensor([0.0, torch.nan]))
    with pytest.raises(CannotContinue, match="up to nan"):
        check_shadow(model, batches(), BETA, threshold=1.0, topology=topology)


def test_fp8_comes_back_even_after_an_error(model: list[MegatronModule]) -> None:
    set_fp8(model, "e4m3")
    with pytest.raises(KeyError), without_fp8(model):
        assert not any(module.config.fp8 for module in model[0].modules() if isinstance(module, MegatronModule))
        raise KeyError
    assert {module.config.fp8 for module in model[0].modules() if isinstance(module, MegatronModule)} == {"e4m3"}


def test_a_rank_without_margins_has_no_deviation(model: list[MegatronModule]) -> None:
    assert deviation(model, lambda: torch.zeros(0)) == 0.0
