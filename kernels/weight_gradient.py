"""Gradients of weights, added up in fp32: a product is not rounded to the weight's dtype before it is added."""

import torch
from torch import Tensor

# Before its 2.10 PyTorch refuses to add to a matrix of another dtype than the factors. Builds before the release, as
# those of NVIDIA's images (2.10.0a0), count as older.
ADDS_IN_FP32 = torch.__version__ >= (2, 10)


def add_product(total: Tensor, dz: Tensor, x: Tensor) -> None:
    """Add dz^T @ x to `total` [V, H], fp32, in place: dz [n, V] and x [n, H] of one dtype."""
    if not dz.is_cuda:  # a product of another dtype than its factors exists on CUDA only
        total.addmm_(dz.T.float(), x.float())
    elif ADDS_IN_FP32:  # one GEMM that reads and writes `total`
        torch.addmm(total, dz.T, x, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(dz.T, x, out_dtype=torch.float32))


class WeightGradient:
    """The gradient of the vocabulary's matrix, in Megatron's fp32 buffer where the weight has one.

    It is dW [V/tp, H] = sum over parts of dz^T @ x, with dz [n, V/tp] and x [n, H] of the weight's dtype.

    Megatron's data-parallel wrapper gives each parameter `main_grad`, its fp32 place in the gradient buffer, and
    `grad_added_to_main_grad`, which tells the wrapper's hook that there is nothing left to add. The hook still wants
    a gradient of the right shape; with `zero_out_wgrad` (tied embeddings, whose gradient has a second source) it adds
    that gradient, which must then be zero. Without such a buffer the parts are added up in fp32.
    """

    def __init__(self, weight: Tensor, num_parts: int) -> None:
        self.weight = weight
        attributes = vars(weight)  # Megatron adds attributes to its parameters; other parameters do not have them
        main_grad: Tensor | None = attributes.get("main_grad")
        self.in_main_grad = (
            main_grad is not None and main_grad.dtype == torch.float32 and "grad_added_to_main_grad" in attributes
        )
        self.total: Tensor | None = None
        if self.in_main_grad:
            self.total = main_grad
        elif num_parts > 1:
            self.total = torch.zeros_like(weight, dtype=torch.float32)

    def add(self, dz: Tensor, x: Tensor) -> None:
        """Add dz^T @ x of one part: dz [n, V/tp], x [n, H]."""
        if self.total is None:
            self.total = dz.T @ x
        else:
            add_product(self.total, dz, x)

    def result(self) -> Tensor:
        """Return the gradient for autograd: [V/tp, H], without content where Megatron's buffer has it."""
        assert self.total is not None, "at least one part was added"
        if not self.in_main_grad:
            return self.total.to(self.weight.dtype)
        attributes = vars(self.weight)
        attributes["grad_added_to_main_grad"] = True
        return (torch.zeros_like if attributes.get("zero_out_wgrad", False) else torch.empty_like)(self.weight)
