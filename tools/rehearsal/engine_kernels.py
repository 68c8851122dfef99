"""What Transformer Engine's kernels return and keep in memory, for tensors without contents: nothing is computed.

Each function stands for one of the compiled part that layers in bf16 call; what is saved for the backward pass is
decided by Transformer Engine's own Python. Arguments that change nothing about memory are not looked at, since their
number differs between versions.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor

Made: TypeAlias = Tensor | None


def generic_gemm(
    a: Tensor, a_turned: bool, b: Tensor, b_turned: bool, out: Made, quantizer: object, *others: Any, **settings: Any
) -> tuple[Tensor, Made, Made, Made]:
    """Return the product b a, each of them transposed or not, in `out` where there is one; no gradient of a bias. As in
    BLAS a matrix counts as transposed where torch would not call it so: `a_turned` is [columns, inner]."""
    assert quantizer is None, "products in FP8 have no stand-in"
    columns = a.shape[0] if a_turned else a.shape[-1]
    rows = (b.shape[-1],) if b_turned else tuple(b.shape[:-1])
    return (b.new_empty((*rows, columns)) if out is None else out), None, None, None


def rmsnorm_fwd(
    hidden: Tensor, weight: Tensor, eps: float, out: Made, quantizer: object, *others: Any
) -> tuple[Tensor, None, Tensor]:
    """Return the result [rows, h], no mean, and one fp32 number per row."""
    assert quantizer is None, "norms in FP8 have no stand-in"
    return torch.empty_like(hidden) if out is None else out, None, per_row(hidden)


def rmsnorm_bwd(grad: Tensor, hidden: Tensor, scales: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Return gradients of the hidden states and of the weight."""
    return torch.empty_like(hidden), torch.empty_like(weight)


def fused_rope(hidden: Tensor, *others: Any) -> Tensor:
    """Return rotated queries or keys, or their gradient: rotating keeps nothing."""
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def fused_attn_fwd(*arguments: Any) -> list[Tensor]:
    """Return the result, one fp32 number per query and head, and the state of the dropout's random numbers."""
    query, _, value = matrices(arguments)[:3]
    result = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return [result, per_row(query), query.new_empty(2, dtype=torch.int64)]


def fused_attn_bwd(*arguments: Any) -> list[Tensor]:
    """Return the gradients of query, key and value. cuDNN sums the query's in fp32, which is freed here."""
    query, key, value = matrices(arguments)[:3]
    summed = torch.empty_like(query, dtype=torch.float32)  # noqa: F841
    return [torch.empty_like(one, memory_format=torch.contiguous_format) for one in (query, key, value)]


def multi_tensor_l2norm(chunk: int, flag: Tensor, lists: list[list[Tensor]], *others: Any) -> tuple[Tensor, Tensor]:
    """Return the norm of all tensors [1], and none of each."""
    return flag.new_empty(1, dtype=torch.float32), flag.new_empty(0, dtype=torch.float32)


def nothing(*arguments: Any, **settings: Any) -> None:
    """Stand in for a kernel that works in place."""


def per_row(hidden: Tensor) -> Tensor:
    """Return one fp32 number for every row of the last dimension."""
    return hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)


def matrices(arguments: tuple[Any, ...]) -> list[Tensor]:
    """Return query, key, value and what follows them: the arguments with a dimension of heads."""
    return [one for one in arguments if isinstance(one, Tensor) and one.ndim >= 3]


def backend_of_attention(*arguments: Any) -> Any:
    """Choose cuDNN's attention for any length. Newer versions give all in one argument, and want a reason besides."""
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

    arbitrary = FusedAttnBackend["F16_arbitrary_seqlen"]
    return (arbitrary, "") if len(arguments) == 1 else arbitrary


STAND_INS = {
    "generic_gemm": generic_gemm,
    "rmsnorm_fwd": rmsnorm_fwd,
    "rmsnorm_bwd": rmsnorm_bwd,
    "fused_rope_forward": fused_rope,
    "fused_rope_backward": fused_rope,
    "get_fused_attn_backend": backend_of_attention,
    "fused_attn_fwd": fused_attn_fwd,
    "fused_attn_bwd": fused_attn_bwd,
    "multi_tensor_l2norm": multi_tensor_l2norm,
    "multi_tensor_scale": nothing,
    "multi_tensor_adam": nothing,
}
