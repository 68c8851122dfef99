"""The interpreter's checks on a CUDA device: the same cases, and that nothing waits for the GPU. Not run yet."""

from typing import Any

import pytest
import torch
from kernels_cases import CASES, CONSISTENCY, DPO_BOUND, DPO_LOSSES, EPS, ONE_RANK_CASES, run, run_dpo

from srlm_mega.kernels import ops, reference
from srlm_mega.tools.bench_kernels import SHAPES, bench_shape, find_device

pytestmark = pytest.mark.gpu
# As in kernels_cases.py, where a CPU's 44 eps are counted, but for two things. Tensor cores cut off where a CPU rounds:
# 4 eps instead of 2 for each of 16 additions. And the kernels' exp is ex2.approx, right to 2 eps, its argument is
# rounded once more (at most 1 eps of the sum, since x e^-x is below 0.4), and 4099 exponentials are added in 2 steps
# and a tree of 12 (half an eps each): 10 eps of the sum, and so of its logarithm. 86 eps, and half as much for room.
LOGP_BOUND = 128 * EPS
# As in test_interpreter.py; a GPU rounds to bf16 where the interpreter truncates.
GRADIENT_MARGIN = {"float32": LOGP_BOUND, "bfloat16": 2.0**-9}


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


@pytest.mark.parametrize("case", [*CASES, *ONE_RANK_CASES], ids=lambda case: case.name)
def test_head_is_as_exact_as_pytorch(case: Any, device: torch.device) -> None:
    found = run(case, ops.vp_linear_logprob, None, device)
    assert found.ours.logp <= LOGP_BOUND < found.wrong.logp
    assert found.ours.hidden <= found.eager.hidden + GRADIENT_MARGIN[case.dtype] < found.wrong.hidden
    assert found.ours.weight <= found.eager.weight + GRADIENT_MARGIN[case.dtype] < found.wrong.weight


@pytest.mark.parametrize(("loss_type", "smoothing"), DPO_LOSSES)
def test_dpo_kernel(loss_type: Any, smoothing: float, device: torch.device) -> None:
    found = run_dpo(ops.dpo_loss, loss_type, smoothing, device)
    assert max(found[name] for name in ("loss", "sums", "seq_logp", "per_pair", "gradient")) <= DPO_BOUND
    assert found["bit equal"] and found["unpaired"] == 0


def test_dpo_kernel_with_a_consistency_for_each_pair(device: torch.device) -> None:
    found = run_dpo(ops.dpo_loss, "sigmoid", 0.0, device, CONSISTENCY)
    assert max(found[name] for name in ("loss", "sums", "seq_logp", "per_pair", "gradient")) <= DPO_BOUND
    assert found["bit equal"] and found["unpaired"] == 0 and found["without smoothing"] > 1e-3


def test_nothing_waits_for_the_gpu(device: torch.device) -> None:
    """Forward and backward of the whole head under PyTorch's check for synchronisation."""
    hidden = torch.randn(64, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(640, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    rows, target = torch.arange(40, device=device), torch.arange(40, device=device)
    bounds, pairs = torch.tensor([0, 20, 40], device=device), torch.tensor([[0, 1]], device=device)
    ref = torch.zeros(2, device=device)

    def head() -> None:
        logp = ops.vp_linear_logprob(hidden, weight, target, rows, vocab_start=0, tp_group=None)
        ops.dpo_loss(logp, bounds, pairs, ref, ops.DpoSettings(0.1)).loss.backward()

    head()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        head()
        with pytest.raises(RuntimeError, match="synchroniz"):
            hidden.grad.nonzero()  # type: ignore[union-attr]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_gradient_is_written_over_the_logits(device: torch.device) -> None:
    logits = torch.randn(9, 5000, device=device) * 5
    target = torch.arange(9, device=device)
    leaf = logits.clone().requires_grad_()
    logp = ops.vp_logprob_(leaf, target, vocab_start=0, tp_group=None)
    (grad,) = torch.autograd.grad(logp.sum(), leaf)
    whole = logits.double().requires_grad_()
    true = reference.vp_logprob(whole, target, vocab_start=0, tp_group=None)
    (true_grad,) = torch.autograd.grad(true.sum(), whole)
    assert grad.data_ptr() == leaf.data_ptr()
    # log p is below 64, where fp32 numbers are 32 eps apart, and rounded three times. The sum of 5000 exponentials is
    # right to 10 eps, as counted above, and so its logarithm is. The gradient's error is relative, and it is below 1.
    bound = (3 * 16 + 10) * EPS
    assert (logp - true).abs().max() <= bound and (grad - true_grad).abs().max() <= bound


def test_every_provider_of_the_benchmark_is_right() -> None:
    labels = [row.labels for row in bench_shape(SHAPES[2], find_device(), rounds=3)]
    assert {one["provider"] for one in labels if one["status"] == "ok"} >= {"ours-save", "ours-recompute", "eager"}
