"""FP8's ranges, measured by ModelOpt with one layer in memory: those of the whole model, in the memory of one layer."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from model_weights import weights_of
from test_convert import GQA, SHAPES, model, there
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from srlm_mega.checkpoints_conversion import calibrate as calibration
from srlm_mega.checkpoints_conversion.build import Report
from srlm_mega.checkpoints_conversion.calibrate import MAX_TOKENS, calibrate
from srlm_mega.checkpoints_conversion.convert import Kind
from srlm_mega.checkpoints_conversion.fp8 import linear_names
from srlm_mega.checkpoints_conversion.huggingface import write_folder
from srlm_mega.checkpoints_conversion.llama import LlamaShape, huggingface_shapes
from srlm_mega.checkpoints_conversion.reader import Reader
from srlm_mega.tools.planner.sampler_memory import CALIBRATED_TOKENS

PROMPTS = [[1, 5, 2, 9, 4], [7], [3, 3, 8, 11, 0, 6, 10]]


def whole_model(folder: Path, shape: LlamaShape) -> dict[str, float]:
    """The slow twin: all of transformers' model at once, without ModelOpt."""
    whole = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    for parameter in whole.parameters():
        # Mapped from a file, a matrix begins anywhere, and where it begins decides the order of a product's sums.
        parameter.data = parameter.data.clone()
    ranges = dict.fromkeys(linear_names(shape), 0.0)

    def watch(name: str) -> None:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            ranges[name] = max(ranges[name], float(inputs[0].abs().max()))

        whole.get_submodule(name).register_forward_pre_hook(record)

    for name in ranges:
        watch(name)
    with torch.no_grad():
        for tokens in PROMPTS:
            whole(torch.tensor([tokens]))
    return ranges


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_the_ranges_are_those_of_the_whole_model(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    folder = model(tmp_path / "model", shape, dtype)
    amax = calibrate(folder, PROMPTS)
    assert amax.num_prompts == len(PROMPTS)
    assert amax.inputs == whole_model(folder, shape)
    assert len(set(amax.inputs.values())) == 4 * shape.num_layers, "q, k, v see one input, and gate and up another"


def test_other_kinds_of_checkpoints_have_the_same_ranges(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    engine = there(folder, tmp_path / "engine", Kind.TRTLLM, tp=2, pp=2)
    assert calibrate(engine, PROMPTS) == calibrate(folder, PROMPTS)


def alive() -> int:
    """Bytes of all tensors that were not frozen, each memory counted once."""
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in gc.get_objects()
        if issubclass(type(one), Tensor)  # isinstance would wake up the deprecated objects of other packages
    }
    return sum(storages.values())


def test_memory_does_not_grow_with_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the moment when a layer's last matrix is read, where the layer before would still be there."""
    read = Reader.rows
    found: list[int] = []

    def counted(self: Reader, name: str, start: int, count: int) -> np.ndarray:  # type: ignore[type-arg]
        if name.endswith("mlp.down_proj.weight"):
            found.append(alive())
        return read(self, name, start, count)

    monkeypatch.setattr(Reader, "rows", counted)
    peaks = {}
    for layers in (1, 8):
        folder = model(tmp_path / f"model_{layers}", replace(GQA, num_layers=layers, hidden_size=128))
        found.clear()
        gc.collect()
        gc.freeze()  # what is there already counts for nothing, and takes no time
        calibrate(folder, PROMPTS)
        gc.unfreeze()
        assert len(found) >= layers
        peaks[layers] = max(found)
    assert peaks[8] == pytest.approx(peaks[1], abs=2 * 128 * 24 * 2), "less than a second one of its smallest matrices"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "a calibration needs prompts, 128 to 512 of them"),
        ([[1, 2], []], "calibration prompt 2 has no tokens: leave it out"),
        ([[1], [2], [1, GQA.vocab_size]], r"calibration prompt 3 has the token id \d+, .* \d+ tokens: encode it with"),
        ([[-1]], "calibration prompt 1 has the token id -1"),
    ],
)
def test_prompts_that_calibrate_nothing(tmp_path: Path, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(model(tmp_path / "model"), prompts)


def test_what_is_beyond_the_longest_prompt_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_TOKENS", 2)
    folder = model(tmp_path / "model")
    assert calibrate(folder, [[1, 5, 2, 9]]) == calibrate(folder, [[1, 5]])
    assert MAX_TOKENS == CALIBRATED_TOKENS, "what the planner counts"


def test_a_layer_that_overflows_is_named(tmp_path: Path) -> None:
    weights = {name: tensor.to(torch.float16) for name, tensor in weights_of(GQA).items()}
    for name in ("gate_proj", "up_proj"):
        weights[f"model.layers.2.mlp.{name}.weight"] *= 3e4
    write_folder(tmp_path / "model", GQA, weights, tokenizer_from=None)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj has inputs up to (inf|nan): the model is"):
        calibrate(tmp_path / "model", PROMPTS)


def test_progress_is_told_layer_by_layer(tmp_path: Path) -> None:
    totals: list[int] = []
    reports: list[int] = []

    @contextmanager
    def bar(what: str, total: int) -> Iterator[Report]:
        totals.append(total)
        yield reports.append

    calibrate(model(tmp_path / "model"), PROMPTS, bar)
    sizes = huggingface_shapes(GQA)
    assert totals == [sum(reports)] == [2 * sum(prod(size) for name, size in sizes.items() if ".layers." in name)]
    assert len(reports) == GQA.num_layers
