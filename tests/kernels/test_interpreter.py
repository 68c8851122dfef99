"""The kernels at TP 1, 2 and 3 over gloo against the reference in fp64: Triton in its interpreter, and plain PyTorch.

What the interpreter cannot show: speed, races, and rounding to bf16, which it truncates.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
from kernels_cases import CASES, CERTAIN_GRADIENT_BOUND, DPO_BOUND, DPO_LOSSES, LOGP_BOUND, ONE_RANK_CASES
from places import ROOT

WORLD_SIZES = (1, 2, 3)
# Gradients may be so much further from fp64 than eager PyTorch's are, relative to their norm. In fp32: an error
# of log p is a relative error of the whole row's softmax. In bf16: one unit of rounding, for the interpreter truncates,
# twice.
GRADIENT_MARGIN = {"float32": LOGP_BOUND, "bfloat16": 2.0**-8}

Results = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., str]) -> Results:
    """What each world size measured. Processes of their own: interpreting is decided when the kernels are imported."""
    folder, worker = tmp_path_factory.mktemp("kernels"), ROOT / "tests/support/kernels_worker.py"
    for world_size in WORLD_SIZES:
        launch(world_size, worker, world_size, folder / f"{world_size}.json", TRITON_INTERPRET="1")
    return {world_size: json.loads((folder / f"{world_size}.json").read_text()) for world_size in WORLD_SIZES}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_head_is_as_exact_as_pytorch(results: Results, case: Any, world_size: int) -> None:
    check(results[world_size][case.name], case.dtype)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_over_ranks(results: Results, case: Any, world_size: int) -> None:
    """What training on a CPU runs: the definition in the inputs' dtype, split over ranks, without Triton."""
    check(results[world_size][f"reference, {case.name}"], case.dtype)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_with_nothing_to_compute_take_part(results: Results, world_size: int) -> None:
    assert results[world_size]["nothing to compute"] == 0


@pytest.mark.parametrize("case", ONE_RANK_CASES, ids=lambda case: case.name)
def test_head_on_many_rows(results: Results, case: Any) -> None:
    check(results[1][case.name], case.dtype)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_checks_of_the_head_can_fail(results: Results, world_size: int) -> None:
    for case in CASES:
        found = results[world_size][case.name]
        with pytest.raises(AssertionError):
            check({"ours": found["wrong"], "eager": found["eager"]}, case.dtype)
    bf16 = results[world_size]["bf16"]
    assert bf16["eager"]["logp"] > 100 * LOGP_BOUND, "logits rounded to bf16 are what fp32 logits avoid"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_large_logits_and_a_gradient_in_place(results: Results, world_size: int) -> None:
    """Logits of +-1e4: log p to the bound plus fp32's spacing at its size; the gradient in the logits' place."""
    found = results[world_size]["large logits"]
    assert found["largest"] > 1e4, "a target far from the maximum is among them"
    assert found["logp"] <= LOGP_BOUND and found["gradient"] <= CERTAIN_GRADIENT_BOUND and found["elsewhere"] == 0


def test_a_second_backward_pass_is_right_or_refused(results: Results) -> None:
    """What was kept is overwritten by the first one."""
    found = results[1]["second backward"]
    assert found["recompute"] == "equal" and "second backward pass" in found["exp"]


@pytest.mark.parametrize(("loss_type", "smoothing"), DPO_LOSSES)
def test_dpo_kernel(results: Results, loss_type: str, smoothing: float) -> None:
    """Loss, metrics and gradient; two launches give the same bits; a sequence in no pair has no gradient."""
    found = results[1][f"dpo {loss_type} {smoothing}"]
    assert max(found[name] for name in ("loss", "sums", "seq_logp", "per_pair", "gradient")) <= DPO_BOUND
    assert found["bit equal"] and found["unpaired"] == 0
    assert smoothing == 0 or found["without smoothing"] > 1e-3, "the bound sees a wrong label_smoothing"


def test_an_unknown_loss_is_not_the_last_one(results: Results) -> None:
    assert "unknown LOSS_TYPE" in results[1]["unknown loss"]


def test_dpo_kernel_with_a_consistency_for_each_pair(results: Results) -> None:
    """The same bounds; the control leaves the consistency out."""
    found = results[1]["dpo per pair"]
    assert max(found[name] for name in ("loss", "sums", "seq_logp", "per_pair", "gradient")) <= DPO_BOUND
    assert found["bit equal"] and found["unpaired"] == 0 and found["without smoothing"] > 1e-3


def check(found: dict[str, dict[str, float]], dtype: str) -> None:
    """Log p to its bound; gradients as far from fp64 as eager PyTorch's, and the margin."""
    ours, eager = found["ours"], found["eager"]
    assert ours["logp"] <= LOGP_BOUND
    for name in ("hidden", "weight"):
        assert ours[name] <= eager[name] + GRADIENT_MARGIN[dtype], name
