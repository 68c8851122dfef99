"""Checks of the kernels' arguments: a ValueError names the argument, what was given and what is expected.

Shapes, dtypes and devices are always checked, before any launch. Values (targets, rows, bounds, pairs, shares) are
checked only on the CPU: reading them on a GPU would stop the host until the GPU is idle. Code that sends tensors to a
GPU calls `check_targets`, `check_rows`, `check_segments`, `check_pairs` and `check_shares` before it does.
"""

import torch
from torch import Tensor

IGNORE_INDEX = -100
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


def require(condition: bool, name: str, got: object, expected: str) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: got {got}, expected {expected}")


def check_tensor(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], *sizes: int | None, device: torch.device | None = None
) -> None:
    """Raise ValueError unless the tensor has one of the dtypes, these sizes, and the device. None stands for any."""
    require(tensor.dtype in dtypes, name, tensor.dtype, " or ".join(map(str, dtypes)))
    fits = tensor.ndim == len(sizes) and all(want in (None, got) for want, got in zip(sizes, tensor.shape, strict=True))
    wanted = ", ".join("any" if size is None else str(size) for size in sizes)
    require(fits, name, f"shape {list(tensor.shape)}", f"[{wanted}]")
    there = device in (None, tensor.device)
    require(there, name, f"a tensor on {tensor.device}", f"one on {device}, as the others")


def check_targets(target: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless every target (on the CPU) is a token of the vocabulary or -100."""
    wrong = target[(target != IGNORE_INDEX) & ((target < 0) | (target >= vocab_size))]
    require(not len(wrong), "target", f"token {wrong[:1].tolist()}", f"0 to {vocab_size - 1}, or {IGNORE_INDEX}")


def check_rows(rows: Tensor, num_positions: int) -> None:
    """Raise ValueError unless the rows (on the CPU) are different numbers from 0 to `num_positions` - 1."""
    wrong = rows[(rows < 0) | (rows >= num_positions)]
    require(not len(wrong), "rows", f"row {wrong[:1].tolist()}", f"0 to {num_positions - 1}")
    require(len(rows.unique()) == len(rows), "rows", "a row twice", "every row at most once")


def check_segments(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless the bounds (on the CPU) start at 0, never fall, and end at `num_tokens`."""
    fine = cu_seqlens[0] == 0 and cu_seqlens[-1] == num_tokens and bool((cu_seqlens.diff() >= 0).all())
    require(
        bool(fine), "cu_seqlens", cu_seqlens.tolist(), f"rising bounds from 0 to the {num_tokens} log-probabilities"
    )


def check_pairs(pairs: Tensor, num_sequences: int) -> None:
    """Raise ValueError unless the pairs (on the CPU) name existing sequences, each in one place only."""
    wrong = pairs[(pairs < 0) | (pairs >= num_sequences)]
    require(not len(wrong), "pairs", f"sequence {wrong[:1].tolist()}", f"0 to {num_sequences - 1}")
    require(len(pairs.unique()) == pairs.numel(), "pairs", "a sequence twice", "every sequence in at most one pair")


def check_shares(consistency: Tensor) -> None:
    """Raise ValueError unless every consistency (on the CPU) is in [0, 1]."""
    inside = bool(((consistency >= 0) & (consistency <= 1)).all())
    require(inside, "consistency", consistency.tolist(), "shares from 0 to 1")
