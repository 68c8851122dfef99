"""Every parallel layout against the slow twin, in one launch per world size, when a test asks for one of its layouts.

The bound is 1e-4 in fp32 for losses, gradient norms and logits; each kind of check is also seen to fail.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import twin
from safetensors.torch import load_file, save_file
from small_run import BEGUN, LAYOUTS, NAMES, STEPS, VOCAB_SIZE, Layout, config, pairs, sequences
from torch import Tensor
from transformers import LlamaForCausalLM

from srlm_mega.training.batch import TokenSequence

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4
WORKER = Path(__file__).parent / "worker.py"
NEWER = ["TP2, sequence parallel, packed", "PP2 x VPP2", "DP2, distributed optimizer, overlaps"]
FP32 = [name for name in NAMES if "bf16" not in name]
UNTIED = [name for name in FP32 if "tied" not in name]
WORLD_OF = {layout.name: size for size, layouts in LAYOUTS.items() for layout in layouts}
WORLD_OF |= {"refusals": 1, "determinism": 2}
DPO_NAMES = {"loss", "nll_loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "rewards/chosen",
             "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `start`, `other` (another model of the same shape) and `tied`. The vocabulary is odd: TP pads it."""
    root = tmp_path_factory.mktemp("models")
    for seed, (name, tied) in enumerate({"start": False, "other": False, "tied": True}.items()):
        twin.save_start(root / name, seed, tied)
    return root


class Results(dict[str, Any]):
    """What every layout computed, by its name: one launch per world size, when somebody asks for one of it. One that
    failed is not repeated: it raises the same exception again, by which pytest_runtest_makereport knows it."""

    def __init__(self, models: Path, out: Path, launch: Callable[..., str]) -> None:
        super().__init__()
        self._models, self._out, self._launch = models, out, launch
        self._failures: dict[int, AssertionError] = {}

    def __missing__(self, name: str) -> Any:
        world_size = WORLD_OF[name]
        if world_size in self._failures:
            raise self._failures[world_size]
        folder = self._out / str(world_size)
        folder.mkdir()
        try:
            self._launch(world_size, WORKER, self._models, folder)
        except AssertionError as failure:
            self._failures[world_size] = failure
            raise
        self.update(json.loads((folder / "results.json").read_text()))
        return self[name]

    def folder(self, name: str) -> Path:
        """What a layout wrote."""
        assert self[name]
        return self._out / str(WORLD_OF[name]) / name


def each(names: list[str]) -> list[Any]:
    """A test's parameters; eight processes on two cores are for `make test-all`."""
    return [pytest.param(name, marks=[pytest.mark.extra] if WORLD_OF[name] == 8 else []) for name in names]


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., str]) -> Results:
    """Of the launches, as they are asked for."""
    return Results(models, tmp_path_factory.mktemp("layouts"), launch)


@pytest.fixture(scope="module")
def newer(
    models: Path, tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., str], megatron_core_0_19: Path
) -> Results:
    """What some layouts compute with megatron-core 0.19.2. The last one's SFT was begun, alone, by the version here."""
    out = tmp_path_factory.mktemp("newer")
    launch(1, WORKER, models, out, BEGUN)
    (out / NEWER[-1]).mkdir()
    (out / BEGUN).rename(out / NEWER[-1] / "sft")
    path = os.pathsep.join(filter(None, [str(megatron_core_0_19), os.environ.get("PYTHONPATH")]))
    said = launch(2, WORKER, models, out, *NEWER, PYTHONPATH=path)
    assert f"resuming from {out / NEWER[-1]}/sft/megatron/iter_0000003" in said
    results = Results(models, out, launch)
    results.update(json.loads((out / "results.json").read_text()))
    return results


@pytest.fixture(scope="module")
def sft_twin(models: Path) -> list[twin.TwinStep]:
    """Five plain SFT steps."""
    return plain_sft(models / "start", sequences())


@pytest.fixture(scope="module")
def dpo_twin(models: Path) -> list[twin.TwinStep]:
    """Five plain DPO steps."""
    return plain_dpo(models / "start")


def plain_sft(start: Path, items: list[TokenSequence]) -> list[twin.TwinStep]:
    """SFT by the twin."""
    section = config(Layout(""), 1).sft
    return twin.train(
        start, section, len(items), lambda model, batch: twin.sft_loss(model, [items[index] for index in batch])
    )


def plain_dpo(start: Path) -> list[twin.TwinStep]:
    """DPO by the twin, its reference recomputed at every step by a frozen second model."""
    section, items = config(Layout(""), 1).dpo, pairs()
    reference = LlamaForCausalLM.from_pretrained(start)
    return twin.train(
        start,
        section,
        len(items),
        lambda model, batch: twin.dpo_loss(model, [items[index] for index in batch], section, reference),
    )


def difference(metrics: list[dict[str, float]], steps: list[twin.TwinStep]) -> float:
    """Largest difference in loss or gradient norm over all steps."""
    assert len(metrics) == len(steps) == STEPS
    return max(
        max(abs(got["loss"] - want.loss), abs(got["grad_norm"] - want.grad_norm))
        for got, want in zip(metrics, steps, strict=True)
    )


@pytest.mark.parametrize("name", each(UNTIED))
def test_sft_equals_the_twin(name: str, results: Results, sft_twin: list[twin.TwinStep]) -> None:
    assert difference(results[name]["sft"], sft_twin) < TOLERANCE


@pytest.mark.parametrize("name", each(UNTIED))
def test_dpo_equals_the_twin(name: str, results: Results, dpo_twin: list[twin.TwinStep]) -> None:
    assert difference(results[name]["dpo"], dpo_twin) < TOLERANCE


@pytest.mark.parametrize("name", each([name for name in FP32 if name not in UNTIED]))
def test_tied_embeddings_equal_the_twin(name: str, results: Results, models: Path) -> None:
    assert difference(results[name]["sft"], plain_sft(models / "tied", sequences())) < TOLERANCE
    assert difference(results[name]["dpo"], plain_dpo(models / "tied")) < TOLERANCE


def test_bf16_stays_near_the_twin(results: Results, sft_twin: list[twin.TwinStep]) -> None:
    """bf16 rounds to 8 bits: the losses agree to about 2 in 1000, and are not the fp32 ones."""
    assert TOLERANCE < difference(results["single, bf16"]["sft"], sft_twin) < 5e-2


def test_wrong_masks_would_be_seen(results: Results, models: Path) -> None:
    """Negative control: a mask that starts one token late."""
    shifted = [
        TokenSequence(item.id, item.tokens, max(item.num_prompt, 1) + 1)
        if item.num_targets > 1 else item
        for item in sequences()
    ]  # fmt: skip
    assert difference(results["single"]["sft"], plain_sft(models / "start", shifted)) > 10 * TOLERANCE


def test_means_of_means_would_be_seen(results: Results, models: Path) -> None:
    """Negative control: each sequence's mean, averaged, instead of the mean over all tokens."""
    section, items = config(Layout(""), 1).sft, sequences()
    wrong = twin.train(
        models / "start",
        section,
        len(items),
        lambda model, batch: torch.stack([twin.sft_loss(model, [items[index]]) for index in batch]).mean(),
    )
    assert difference(results["single"]["sft"], wrong) > 10 * TOLERANCE


def test_mean_log_probabilities_would_be_seen(results: Results, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: DPO over means of log p instead of sums."""
    summed = twin.target_logps
    monkeypatch.setattr(twin, "target_logps", lambda model, item: summed(model, item) / item.num_targets)
    assert difference(results["single"]["dpo"], plain_dpo(models / "start")) > 10 * TOLERANCE


def logits_of(folder: Path) -> Tensor:
    """Plain transformers' logits of the first four sequences, unpadded, in a padded tensor [4, 32, v]."""
    model = LlamaForCausalLM.from_pretrained(folder)
    logits = torch.zeros(4, 32, VOCAB_SIZE)
    for row, item in enumerate(sequences()[:4]):
        inputs = torch.tensor([item.tokens[:-1]])
        with torch.no_grad():
            logits[row, : inputs.size(1)] = model(input_ids=inputs).logits[0]
    return logits


def logit_difference(got: Tensor, want: Tensor) -> float:
    """Largest difference at real positions."""
    return max(
        (got[row, : len(item.tokens) - 1] - want[row, : len(item.tokens) - 1]).abs().max().item()
        for row, item in enumerate(sequences()[:4])
    )


@pytest.mark.parametrize("name", each(FP32))
def test_logits_equal_transformers(name: str, results: Results, models: Path) -> None:
    want = logits_of(models / ("start" if name in UNTIED else "tied"))
    assert logit_difference(torch.load(results.folder(name) / "logits.pt"), want) < TOLERANCE


@pytest.mark.parametrize("name", each(FP32))
def test_trained_exports_hold_what_was_trained(name: str, results: Results) -> None:
    """The exported folders of all layouts are one model, up to rounding that Adam's first steps enlarge.

    An export without the last update, or without other ranks' part of it, would be off by about its learning rate.
    """
    single = "single" if name in UNTIED else "single, tied"
    got = load_file(results.folder(name) / "sft/huggingface/model.safetensors")
    want = load_file(results.folder(single) / "sft/huggingface/model.safetensors")
    assert got.keys() == want.keys()
    assert max((got[key] - want[key]).abs().max().item() for key in got) < config(Layout(""), 1).sft.min_lr / 2


@pytest.mark.parametrize("other", ["q", "v"])
def test_swapped_weights_would_be_seen(other: str, results: Results, models: Path, tmp_path: Path) -> None:
    """Negative control: the keys of one layer in the place of its values, or of its first queries."""
    weights = load_file(models / "start/model.safetensors")
    key, name = (f"model.layers.1.self_attn.{part}_proj.weight" for part in ("k", other))
    keys = weights[key].clone()
    weights[key] = weights[name][: len(keys)].clone()
    weights[name][: len(keys)] = keys
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((models / "start/config.json").read_bytes())
    got = torch.load(results.folder("single") / "logits.pt")
    assert logit_difference(got, logits_of(tmp_path)) > 10 * TOLERANCE


@pytest.mark.parametrize("name", each(FP32))
def test_round_trip_is_bit_identical(name: str, results: Results, models: Path) -> None:
    want = load_file(models / ("start" if name in UNTIED else "tied") / "model.safetensors")
    got = load_file(results.folder(name) / "round_trip/model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("name", each(UNTIED))
def test_reference_equals_the_twin(name: str, results: Results, models: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(models / "start")
    got = results[name]["reference"]
    assert [record["pair_id"] for record in got] == [pair.id for pair in pairs()]
    with torch.no_grad():
        for record, pair in zip(got, pairs(), strict=True):
            assert record["chosen"] == pytest.approx(twin.target_logps(model, pair.chosen).sum().item(), abs=1e-3)
            assert record["rejected"] == pytest.approx(twin.target_logps(model, pair.rejected).sum().item(), abs=1e-3)


@pytest.mark.parametrize("name", each(FP32))
def test_first_dpo_step_is_ln_2(name: str, results: Results) -> None:
    first, last = results[name]["dpo"][0], results[name]["dpo"][-1]
    assert first["loss"] - 0.3 * first["nll_loss"] == pytest.approx(math.log(2), abs=TOLERANCE)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=TOLERANCE)
    assert last["rewards/margins"] > 0.1


def test_a_failed_launch_is_not_repeated(tmp_path: Path) -> None:
    """Tests of one launch fail by one exception: the first one is the failure, the others are skipped."""
    launched, raised = [], []

    def launch(*arguments: object) -> str:
        launched.append(arguments)
        raise AssertionError("a port was taken")

    results = Results(tmp_path, tmp_path, launch)
    for name in ("TP2", "PP2", "TP2 x PP2"):
        with pytest.raises(AssertionError, match="a port was taken") as caught:
            results.folder(name)
        raised.append(caught.value)
    assert raised[0] is raised[1] is not raised[2] and len(launched) == 2


@pytest.mark.extra
@pytest.mark.parametrize("name", NEWER)
def test_megatron_core_0_19_equals_the_twin(
    name: str, newer: Results, sft_twin: list[twin.TwinStep], dpo_twin: list[twin.TwinStep]
) -> None:
    assert newer["megatron-core"] == "0.19.2"
    assert difference(newer[name]["sft"], sft_twin) < TOLERANCE
    assert difference(newer[name]["dpo"], dpo_twin) < TOLERANCE


def test_metrics_have_trl_names(results: Results) -> None:
    assert results["TP2"]["dpo"][0].keys() >= DPO_NAMES
    assert results["TP2"]["sft"][0].keys() >= {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens"}
    tokens = sum(len(item.tokens) for item in sequences())
    last = results["TP2"]["sft"][-1]
    assert last["epoch"] == pytest.approx(STEPS * 8 / 19)
    assert 2 * tokens < last["num_tokens"] < 3 * tokens  # 40 items are two passes of 19 and 2 more


def test_learning_rate_ends(results: Results) -> None:
    rates = [step["learning_rate"] for step in results["TP2"]["sft"]]
    assert rates[0] == pytest.approx(3e-3) and rates[-1] == pytest.approx(3e-4)


def test_reference_of_another_model_is_refused(results: Results) -> None:
    assert "not the starting model's" in results["refusals"]["messages"]["reference of another model"]


def test_exploding_training_stops_without_export(results: Results) -> None:
    assert "Nothing was exported" in results["refusals"]["messages"]["not finite"]
    assert not results["refusals"]["exported"]


def test_an_export_is_read_back(results: Results) -> None:
    """4 layers of 6 tensors, the embedding, the last norm and the output; then one number of one of them altered."""
    assert results["refusals"]["verified"] == 4 * 6 + 3
    said = results["refusals"]["messages"]["altered export"]
    assert "does not hold what was trained: decoder.layers.2.mlp.linear_fc2.weight differ (of 1)" in said


def test_too_long_sequences_are_left_out_and_counted(results: Results) -> None:
    assert results["refusals"]["excluded"] == 1


def test_same_seed_same_bytes(results: Results) -> None:
    first, again, other_seed = results["determinism"]["hashes"]
    assert first == again
    assert first != other_seed
