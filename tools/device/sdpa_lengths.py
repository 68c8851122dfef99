"""`srlm bench device`: attention over 64 sequences of 64 lengths, forward and backward, by each backend of
scaled_dot_product_attention and, packed in one call, by torch's varlen attention.

The first call of a length may build a graph (cuDNN) or compile, so it is timed apart from the steady ones.
"""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from srlm_mega.tools.bench_kernels import find_device, interleaved
from srlm_mega.tools.bench_record import BenchRow, make_record, make_row, table, write_record
from srlm_mega.tools.device.first_call import gpu_name, wall_milliseconds

VARLEN = "torch.nn.attention.varlen"
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
REPETITIONS = 5


@dataclass(frozen=True)
class Heads:
    """Lengths of the sequences, number of heads, and their size, in one dtype."""

    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype


ON_GPU = Heads(tuple(range(33, 2081, 32)), 32, 128, torch.bfloat16)  # 33, 65, ... 2049: none is a multiple of 8
SMOKE = Heads((5, 9), 2, 16, torch.float32)


def main(json: Annotated[Path, typer.Option(help="The record to write.")]) -> None:
    """Time attention over many lengths."""
    device = find_device()
    shape = ON_GPU if device.type == "cuda" else SMOKE
    rows: list[BenchRow] = []
    settings = vars(shape) | {"dtype": str(shape.dtype), "pass": "forward + backward", "cuda": torch.version.cuda}
    for name in (*BACKENDS, VARLEN):
        rows += packed(shape, device) if name == VARLEN else by_backend(name, shape, device)
        record = make_record("sdpa lengths", settings, rows, ("flash-attn",), gpu_name(device))
        write_record(record, json)  # after each, so that a cut-off keeps the others
    print(table(record))


def inputs(shape: Heads, length: int, device: torch.device) -> list[Tensor]:
    """Return query, key and value [length, heads, d]."""
    sizes = (length, shape.heads, shape.head_dim)
    return [torch.randn(sizes, device=device, dtype=shape.dtype, requires_grad=True) for _ in range(3)]


def by_backend(name: str, shape: Heads, device: torch.device) -> list[BenchRow]:
    """Time a call per sequence: the first of each length, and the median of later ones."""

    def attend(tensors: Sequence[Tensor]) -> None:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in tensors)
        with sdpa_kernel(BACKENDS[name]):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    return timed_rows(name, [partial(attend, inputs(shape, length, device)) for length in shape.lengths], device)


def packed(shape: Heads, device: torch.device) -> list[BenchRow]:
    """Time all sequences packed in one call, where torch has varlen attention."""
    if importlib.util.find_spec(VARLEN) is None:
        return [refused("varlen", f"torch {torch.__version__} has no {VARLEN}")]
    varlen_attn: Callable[..., Tensor] = vars(import_module(VARLEN))["varlen_attn"]
    tensors = inputs(shape, sum(shape.lengths), device)
    bounds = torch.tensor([0, *shape.lengths], device=device).cumsum(0, dtype=torch.int32)
    longest = max(shape.lengths)

    has_window = "window_size" in inspect.signature(varlen_attn).parameters  # torch 2.10 has `is_causal` in its place
    causal = {"window_size": (-1, 0)} if has_window else {"is_causal": True}

    def attend() -> None:
        out = varlen_attn(*tensors, bounds, bounds, longest, longest, **causal)
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    return timed_rows("varlen", [attend], device)


def timed_rows(name: str, calls: Sequence[Callable[[], None]], device: torch.device) -> list[BenchRow]:
    """Return the first calls in ms by the clock, later ones on the stream, what the host took for these; or why not."""
    try:
        first = [wall_milliseconds(call, device) for call in calls]
    except RuntimeError as error:  # the backend does not take these inputs here
        return [refused(name, str(error).splitlines()[0])]
    taken = interleaved({str(number): call for number, call in enumerate(calls)}, device, REPETITIONS)
    steady = [median(sample.milliseconds for sample in samples) for samples in taken.values()]
    host = [median(sample.host_milliseconds or 0.0 for sample in samples) for samples in taken.values()]
    labels = {"backend": name, "status": "ok"}
    return [
        make_row(f"{name}, first call of a length", "ms", first, labels=labels, extra={"sum": sum(first)}),
        make_row(f"{name}, later calls", "ms", steady, labels=labels, extra={"sum": sum(steady)}),
        make_row(f"{name}, later calls, host", "ms", host, labels=labels, extra={"sum": sum(host)}),
    ]


def refused(name: str, reason: str) -> BenchRow:
    """Return the row of what cannot be measured here."""
    return make_row(name, "ms", (), labels={"backend": name, "status": reason})


if __name__ == "__main__":
    typer.run(main)
