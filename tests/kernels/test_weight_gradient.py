"""The vocabulary's gradient: Megatron's protocol for main_grad, and sums in fp32."""

import torch
from torch import Tensor

from srlm_mega.kernels.logprob import WeightGradient


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
