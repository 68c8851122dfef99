"""The vocabulary's gradient: Megatron's protocol for main_grad, and sums in fp32."""

import pytest
import torch
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor

from srlm_mega.kernels import weight_gradient
from srlm_mega.kernels.weight_gradient import WeightGradient, add_product
from srlm_mega.training.layer_torch import use_without_apex


def parts(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Three parts of dz [4, 6] and x [4, 3]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (4, 3)] * 3
    dz_and_x = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return list(zip(dz_and_x[::2], dz_and_x[1::2], strict=True))


def true_sum(dtype: torch.dtype) -> Tensor:
    return torch.stack([dz.double().T @ x.double() for dz, x in parts(dtype)]).sum(0)


def add_all(weight: Tensor) -> Tensor:
    gradient = WeightGradient(weight, num_parts=3)
    for dz, x in parts(weight.dtype):
        gradient.add(dz, x)
    return gradient.result()


def megatron_weight() -> torch.nn.Parameter:
    """A bf16 parameter as Megatron's data-parallel wrapper leaves it, its buffer holding 1.0 from an earlier batch."""
    weight = torch.nn.Parameter(torch.zeros(6, 3, dtype=torch.bfloat16))
    vars(weight).update(main_grad=torch.ones(6, 3), grad_added_to_main_grad=False)
    return weight


def test_the_gradient_goes_to_megatron_s_buffer_in_fp32() -> None:
    weight = megatron_weight()
    buffer = vars(weight)["main_grad"]
    returned = add_all(weight)
    true = true_sum(torch.bfloat16) + 1
    # 12 products and the 1.0 are added up below 16, where fp32 numbers are 8 eps apart: 13 times half of that.
    assert (buffer - true).abs().max() < 13 * 4 * torch.finfo(torch.float32).eps
    assert (buffer.bfloat16() - true).abs().max() > 1e-3, "the bound above sees a buffer of bf16"
    assert vars(weight)["grad_added_to_main_grad"] is True
    assert returned.shape == weight.shape and returned.dtype == weight.dtype, "Megatron's hook wants a gradient there"


def test_tied_embeddings_are_given_a_gradient_of_zero() -> None:
    """Megatron's hook adds what it is given once more, for the embedding's part."""
    weight = megatron_weight()
    vars(weight)["zero_out_wgrad"] = True
    assert not add_all(weight).any()


def test_without_a_buffer_parts_are_added_up_in_fp32() -> None:
    returned = add_all(torch.zeros(6, 3, dtype=torch.bfloat16))
    true = true_sum(torch.bfloat16)
    assert returned.dtype == torch.bfloat16
    assert torch.equal(returned, true.bfloat16()), "rounded once, at the end"
    one_by_one = torch.zeros(6, 3, dtype=torch.bfloat16)
    for dz, x in parts(torch.bfloat16):
        one_by_one += dz.T @ x
    assert not torch.equal(returned, one_by_one), "sums in bf16 are others"


def test_a_single_part_needs_no_buffer() -> None:
    weight = torch.zeros(6, 3)
    gradient = WeightGradient(weight, num_parts=1)
    dz, x = parts(torch.float32)[0]
    gradient.add(dz, x)
    assert torch.equal(gradient.result(), dz.T @ x)


def accumulated(fused: bool, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The fp32 buffer after three micro batches through Megatron's own linear layer, and its hook."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    use_without_apex()
    weight = megatron_weight()
    buffer: Tensor = vars(weight)["main_grad"]
    for dz, x in parts(torch.bfloat16):
        out = linear_with_grad_accumulation_and_async_allreduce(
            x, weight, None, fused, allreduce_dgrad=False, sequence_parallel=False, tp_group=object()
        )
        out.backward(dz)
        if not vars(weight)["grad_added_to_main_grad"]:
            assert weight.grad is not None
            buffer += weight.grad
        weight.grad = None
    return buffer


def test_megatrons_linear_adds_to_its_buffer_without_rounding_to_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Today's road rounds every micro batch's gradient to bf16, by up to 2^-9 of it, before it is added in fp32."""
    true = true_sum(torch.bfloat16) + 1
    ours, rounded = ((accumulated(fused, monkeypatch) - true).abs().max() for fused in (True, False))
    # As above: products of bf16 numbers are exact in fp32, and 13 terms are added up below 16.
    assert ours < 13 * 4 * torch.finfo(torch.float32).eps
    assert rounded > 100 * ours


def test_a_gpu_adds_in_the_product_or_before_2_10_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both roads of CUDA, with the products of two dtypes that a CPU lacks computed in fp32."""

    class OnCuda(Tensor):
        """A tensor on the CPU that says it is on CUDA."""

        is_cuda = True

    addmm, mm, called = torch.addmm, torch.mm, []

    def added(total: Tensor, one: Tensor, other: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        called.append("addmm")
        return addmm(total, one.float(), other.float(), out=out)

    def multiplied(one: Tensor, other: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        called.append("mm")
        return mm(one.float(), other.float())

    monkeypatch.setattr(torch, "addmm", added)
    monkeypatch.setattr(torch, "mm", multiplied)
    sums = []
    for together in (True, False):
        monkeypatch.setattr(weight_gradient, "ADDS_IN_FP32", together)
        total = torch.ones(6, 3)
        for dz, x in parts(torch.bfloat16):
            add_product(total, dz.as_subclass(OnCuda), x)
        sums.append(total)
    assert called == ["addmm"] * 3 + ["mm"] * 3
    for total in sums:
        assert (total - true_sum(torch.bfloat16) - 1).abs().max() < 13 * 4 * torch.finfo(torch.float32).eps
