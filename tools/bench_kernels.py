"""`srlm bench kernels`: time and memory of the DPO head, ours against eager PyTorch, torch.compile and Liger.

One process. For each shape every provider is first compared with fp64; one that is wrong is reported and not timed.
Rounds are interleaved (every provider once, then again), with the L2 cache flushed before each sample; memory is
measured in a pass of its own. Without a GPU a smoke mode runs tiny shapes, where "ours" is the plain reference: its
times say nothing. The GPU side of this file did not run yet.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from srlm_mega.errors import UserError
from srlm_mega.kernels import ops
from srlm_mega.run.provenance import package_version
from srlm_mega.tools.bench_heads import (
    PROVIDERS,
    Head,
    HeadBatch,
    HeadShape,
    Provider,
    make_batch,
    make_head,
    make_inputs,
    our_dpo_loss,
    true_loss,
)
from srlm_mega.tools.bench_record import BenchRecord, BenchRow, make_record, make_row, write_record

SHAPES = (
    HeadShape("7b", 4, 1024, 4096, 32000),
    HeadShape("7b-masked", 4, 1024, 4096, 32000, completion_fraction=0.5),
    HeadShape("70b-tp8", 4, 1024, 8192, 4000),
    HeadShape("8b-128k", 4, 1024, 4096, 128256),
)
SWEEPS = (
    *(HeadShape(f"tokens-{2 * pairs * 1024}", pairs, 1024, 4096, 32000) for pairs in (1, 2, 4, 8, 16)),
    *(HeadShape(f"vocab-{columns}", 4, 1024, 4096, columns) for columns in (8000, 16000, 32000, 64000, 128000)),
)
SMOKE_SHAPES = (
    HeadShape("smoke", 2, 24, 32, 101),
    HeadShape("smoke-masked", 2, 24, 32, 101, completion_fraction=0.5),
    *(HeadShape(f"tokens-{4 * length}", 2, length, 32, 101) for length in (16, 32)),
    *(HeadShape(f"vocab-{columns}", 2, 16, 32, columns) for columns in (64, 256)),
)
SMOKE_PROVIDERS: tuple[Provider, ...] = ("ours-save", "ours-recompute", "eager", "liger")
PACKAGES = ("triton", "liger-kernel")
# Further than this from fp64, relatively, a loss or gradient is wrong: rounding logits to bf16, as eager code does,
# moves a margin by some tenths of a nat.
WRONG = {torch.bfloat16: 0.1, torch.float32: 1e-4}
ALONE = "alone "  # what a row of one kernel begins with
FLUSH_BYTES = 256 * 2**20  # several times the L2 cache
Call = Callable[[], object]
Status = Literal["ok", "wrong", "out of memory", "absent"]


@dataclass(frozen=True)
class Errors:
    """Relative distances from fp64: of the loss, and of the gradients of hidden states and weight."""

    loss: float
    hidden: float
    weight: float

    @property
    def largest(self) -> float:
        """The worst; NaN counts as infinite."""
        return max(value if value == value else float("inf") for value in (self.loss, self.hidden, self.weight))


@dataclass(frozen=True)
class Result:
    """One provider on one shape. Raw samples in ms; bytes beyond the inputs and the two gradients, None on a CPU."""

    shape: str
    provider: Provider
    status: Status
    errors: Errors | None = None
    forward_ms: tuple[float, ...] = ()
    forward_backward_ms: tuple[float, ...] = ()
    extra_bytes: int | None = None


@dataclass(frozen=True)
class Device:
    """Where samples are taken."""

    torch_device: torch.device
    dtype: torch.dtype

    @property
    def on_gpu(self) -> bool:
        """Whether times mean something."""
        return bool(self.torch_device.type == "cuda")

    @property
    def name(self) -> str:
        """As it stands in the result."""
        return str(torch.cuda.get_device_name(self.torch_device)) if self.on_gpu else "CPU (smoke mode)"


def find_device() -> Device:
    """The GPU in bf16, or the CPU in fp32."""
    if torch.cuda.is_available():
        return Device(torch.device("cuda"), torch.bfloat16)
    return Device(torch.device("cpu"), torch.float32)


def run_benchmark(json: Path | None, rounds: int, only: Sequence[str], sweep: bool) -> None:
    """All shapes (or those named in `only`), a table, and everything with raw samples in `json`."""
    device = find_device()
    known = {shape.name: shape for shape in (SHAPES + SWEEPS if device.on_gpu else SMOKE_SHAPES)}
    default = [shape.name for shape in SHAPES + (SWEEPS if sweep else ())] if device.on_gpu else list(known)
    if unknown := set(only) - set(known):
        raise UserError(f"no shape is called {', '.join(sorted(unknown))} here: {', '.join(known)}")
    results: list[Result] = []
    for name in only or default:
        results += bench_shape(known[name], device, rounds)
    parts = bench_parts(device, rounds)
    if json is not None:
        shapes = [known[name] for name in only or default]
        write_record(record(device, shapes, results, parts), json)
    print_tables(known, results, parts, device)


def record(
    device: Device, shapes: Sequence[HeadShape], results: Sequence[Result], parts: Sequence[BenchRow]
) -> BenchRecord:
    """The JSON file. What was not timed has a row without samples that says why."""
    rows = [*(row for result in results for row in rows_of(result)), *parts]
    settings = {
        "on_gpu": device.on_gpu,
        "dtype": str(device.dtype),
        "cuda": torch.version.cuda,
        "shapes": [asdict(shape) for shape in shapes],
    }
    return make_record("kernels", device.name, 1, settings, rows, PACKAGES)


def rows_of(result: Result) -> list[BenchRow]:
    """Forward, and forward with backward, of one provider on one shape."""
    name = f"{result.shape} {result.provider}"
    labels = {"shape": result.shape, "provider": result.provider, "status": result.status}
    errors = {} if result.errors is None else {f"error_{part}": off for part, off in asdict(result.errors).items()}
    if result.status != "ok":
        return [make_row(name, "ms", (), labels=labels, extra=errors)]
    memory = {"extra_bytes": None if result.extra_bytes is None else float(result.extra_bytes)}
    return [
        make_row(f"{name} forward", "ms", result.forward_ms, labels=labels | {"pass": "forward"}, extra=errors),
        make_row(
            f"{name} forward + backward",
            "ms",
            result.forward_backward_ms,
            labels=labels | {"pass": "forward + backward"},
            extra=errors | memory,
        ),
    ]


def bench_shape(shape: HeadShape, device: Device, rounds: int) -> list[Result]:
    """Accuracy, then interleaved times, then memory."""
    batch = make_batch(shape, device.torch_device)
    hidden, weight = make_inputs(shape, device.dtype, device.torch_device)
    truth = true_values(hidden, weight, batch)
    refused: list[Result] = []
    heads: dict[Provider, Head] = {}
    errors: dict[Provider, Errors] = {}
    for provider in PROVIDERS if device.on_gpu else SMOKE_PROVIDERS:
        if provider == "liger" and package_version("liger-kernel") is None:
            refused.append(Result(shape.name, provider, "absent"))
            continue
        head = make_head(provider, batch)
        try:
            found = errors_of(head, hidden, weight, truth)
        except torch.OutOfMemoryError:
            refused.append(Result(shape.name, provider, "out of memory"))
            continue
        if found.largest > WRONG[device.dtype]:
            refused.append(Result(shape.name, provider, "wrong", found))
        else:
            heads[provider], errors[provider] = head, found
    del truth
    forward: dict[str, Call] = {}
    both: dict[str, Call] = {}
    for provider, head in heads.items():
        forward[provider] = lambda head=head: head(hidden, weight)  # type: ignore[misc]
        both[provider] = lambda head=head: torch.autograd.grad(head(hidden, weight), [hidden, weight])  # type: ignore[misc]
    forward_ms, both_ms = interleaved(forward, device, rounds), interleaved(both, device, rounds)
    timed = [
        Result(
            shape.name, provider, "ok", errors[provider], forward_ms[provider], both_ms[provider],
            extra_bytes(both[provider], hidden, weight) if device.on_gpu else None,
        )
        for provider in heads
    ]  # fmt: skip
    return timed + refused


def true_values(hidden: Tensor, weight: Tensor, batch: HeadBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients in fp64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    loss = true_loss(hidden, weight, batch)
    return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])


def errors_of(head: Head, hidden: Tensor, weight: Tensor, truth: tuple[Tensor, Tensor, Tensor]) -> Errors:
    """One run of a head against fp64."""
    loss = head(hidden, weight)
    found = (loss.detach(), *torch.autograd.grad(loss, [hidden, weight]))
    pairs = zip(found, truth, strict=True)
    return Errors(*(float((ours.double() - true).norm() / true.norm()) for ours, true in pairs))


def interleaved(calls: dict[str, Call], device: Device, rounds: int, warmup: int = 3) -> dict[str, tuple[float, ...]]:
    """Samples in ms: every call once per round. The first `warmup` rounds are dropped."""
    flush = torch.empty(FLUSH_BYTES if device.on_gpu else 0, dtype=torch.int8, device=device.torch_device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup + rounds):
        for name, call in calls.items():
            flush.zero_()
            samples[name].append(gpu_ms(call) if device.on_gpu else cpu_ms(call))
    return {name: tuple(values[warmup:]) for name, values in samples.items()}


def gpu_ms(call: Call) -> float:
    """Between two events on the stream."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def cpu_ms(call: Call) -> float:
    """By the clock."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def extra_bytes(call: Call, hidden: Tensor, weight: Tensor) -> int:
    """Peak memory of forward and backward, without what was there before and without the two gradients."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes)


def bench_parts(device: Device, rounds: int) -> list[BenchRow]:
    """`vp_logprob_` forward and backward, a copy of the logits, and `dpo_loss` of 8 pairs, which makes its gradient,
    each with the bytes it cannot avoid to move."""
    num_rows, columns = (8192, 32000) if device.on_gpu else (32, 101)
    generator = torch.Generator(device.torch_device).manual_seed(0)
    options = {"device": device.torch_device, "generator": generator}
    logits = torch.randn(num_rows, columns, dtype=device.dtype, **options).requires_grad_()
    other = torch.empty_like(logits)
    target = torch.randint(columns, (num_rows,), **options)
    shape = HeadShape("parts", 8, num_rows // 16, 1, columns)
    batch = make_batch(shape, device.torch_device)
    logp = -torch.rand(num_rows, **options).requires_grad_()

    def log_probs() -> None:
        # The backward pass overwrites the logits: with a gradient of [T] ones they stay of the size of 1.
        out = ops.vp_logprob_(logits, target, vocab_start=0, tp_group=None)
        torch.autograd.grad(out, logits, torch.ones_like(out))

    calls = {
        "vp_logprob_": log_probs,
        "copy": lambda: other.copy_(logits.detach()),
        "dpo_loss": lambda: our_dpo_loss(logp, batch),
    }
    samples = interleaved(calls, device, rounds)
    # Log-probs: read once forward, read and written once backward.
    useful = {"vp_logprob_": 3 * logits.nbytes, "copy": 2 * logits.nbytes, "dpo_loss": 2 * logp.nbytes}
    return [
        make_row(f"{ALONE}{name}", "ms", samples[name], extra={"useful_bytes": float(useful[name])}) for name in calls
    ]


def tflops(shape: HeadShape, milliseconds: float) -> float:
    """Useful ones of forward and backward: three products of [N, H] and [V, H], completion rows only."""
    return 6 * shape.num_rows * shape.hidden_size * shape.vocab_size / milliseconds / 1e9


def spread(samples: Sequence[float]) -> str:
    """median [p10, p90]"""
    ordered = sorted(samples)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return f"{statistics.median(ordered):.3f} [{low:.3f}, {high:.3f}]"


def print_tables(
    shapes: dict[str, HeadShape], results: Sequence[Result], parts: Sequence[BenchRow], device: Device
) -> None:
    """What a person reads, as Markdown."""
    print(f"DPO head on {device.name}, {device.dtype}; ms: median [p10, p90]\n")
    print("| shape | provider | forward | forward + backward | TFLOP/s | extra GB | off fp64 |")
    print("|---|---|---|---|---|---|---|")
    for result in results:
        error = f"{result.errors.largest:.1e}" if result.errors else ""
        cells = [result.status, "", "", ""]
        if result.status == "ok":
            rate = tflops(shapes[result.shape], statistics.median(result.forward_backward_ms))
            memory = "" if result.extra_bytes is None else f"{result.extra_bytes / 1e9:.2f}"
            cells = [spread(result.forward_ms), spread(result.forward_backward_ms), f"{rate:.1f}", memory]
        print("| " + " | ".join([result.shape, result.provider, *cells, error]) + " |")
    print("\n| alone | ms | GB/s |\n|---|---|---|")
    for part in parts:
        rate = (part.extra["useful_bytes"] or 0) / statistics.median(part.samples) / 1e6
        print(f"| {part.name.removeprefix(ALONE)} | {spread(part.samples)} | {rate:.1f} |")
    if not device.on_gpu:
        print("\nNo GPU: tiny shapes in fp32 on the CPU, where ours is the plain reference. No figure counts.")
