"""`srlm bench kernels`: time and memory of the DPO head, ours against eager PyTorch, torch.compile and Liger.

One process. For each shape every provider is first compared with fp64; one that is wrong is reported and not timed.
Rounds are interleaved (every provider once, then again), each sample behind work that empties the L2 cache and hides
the host (bench_stream.py), whose time is a row of its own; memory is measured in another pass. Without a GPU a smoke
mode runs tiny shapes, where "ours" is the plain reference: its times say nothing. The GPU side of this file has not run
yet.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from math import inf, isnan
from operator import itemgetter
from pathlib import Path

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
from srlm_mega.tools.bench_record import BenchRecord, BenchRow, make_record, make_row, markdown, spread, write_record
from srlm_mega.tools.bench_stream import StreamSample, StreamTimer
from srlm_mega.tools.bench_timing import take_turns, timed

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
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
# Further than this from fp64, relatively, a loss or gradient is wrong: rounding logits to bf16, as eager code does,
# moves a margin by some tenths of a nat.
WRONG = {"cuda": 0.1, "cpu": 1e-4}
ALONE = "alone "  # begins the name of every row of one kernel
HOST = " host"  # ends the name, and the pass, of a row with the host's time of another row
FORWARD, BOTH = "forward", "forward + backward"
FLUSH_BYTES = 256 * 2**20  # several times the L2 cache
WARMUP_ROUNDS = 3
Call = Callable[[], object]


def find_device() -> torch.device:
    """Return the GPU, or the CPU, whose times mean nothing."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_benchmark(json: Path | None, rounds: int, only: Sequence[str], sweep: bool) -> None:
    """Measure all shapes (or those named in `only`), print tables, and write the record with raw samples to `json`."""
    device = find_device()
    on_gpu = device.type == "cuda"
    known = {shape.name: shape for shape in (SHAPES + SWEEPS if on_gpu else SMOKE_SHAPES)}
    default = [shape.name for shape in SHAPES + (SWEEPS if sweep else ())] if on_gpu else list(known)
    if unknown := set(only) - set(known):
        raise UserError(f"no shape is called {', '.join(sorted(unknown))} here: {', '.join(known)}")
    shapes = [known[name] for name in only or default]
    settings = {
        "on_gpu": on_gpu,
        "dtype": str(DTYPES[device.type]),
        "cuda": torch.version.cuda,
        "shapes": [asdict(shape) for shape in shapes],
    }
    name = str(torch.cuda.get_device_name(device)) if on_gpu else "CPU (smoke mode)"
    rows: list[BenchRow] = []
    for shape in (*shapes, None):
        rows += bench_parts(device, rounds) if shape is None else bench_shape(shape, device, rounds)
        record = make_record("kernels", settings, rows, PACKAGES, name)
        write_record(record, json)  # after each shape, so that a cut-off keeps those before it
    print(as_text(record, known))


def bench_shape(shape: HeadShape, device: torch.device, rounds: int) -> list[BenchRow]:
    """Measure the accuracy of every provider, then interleaved times in ms, then memory (on a GPU). A provider that is
    not timed has one row without samples; its label `status` says why."""
    batch = make_batch(shape, device)
    hidden, weight = make_inputs(shape, DTYPES[device.type], device)
    truth = true_values(hidden, weight, batch)
    heads: dict[str, Head] = {}
    errors: dict[str, dict[str, float]] = {}
    refused: list[BenchRow] = []

    def refuse(provider: str, status: str) -> None:
        labels = {"shape": shape.name, "provider": provider, "status": status}
        refused.append(make_row(f"{shape.name} {provider}", "ms", (), labels=labels, extra=errors.get(provider, {})))

    for provider in PROVIDERS if device.type == "cuda" else SMOKE_PROVIDERS:
        if provider == "liger" and package_version("liger-kernel") is None:
            refuse(provider, "absent")
            continue
        head = make_head(provider, batch)
        try:
            errors[provider] = errors_of(with_gradients(head, hidden, weight), truth)
        except torch.OutOfMemoryError:
            refuse(provider, "out of memory")
            continue
        if largest(errors[provider]) > WRONG[device.type]:
            refuse(provider, "wrong")
        else:
            heads[provider] = head
    del truth  # in fp64 it takes memory that the heads may need
    passes = {provider: partial(with_gradients, head, hidden, weight) for provider, head in heads.items()}
    forward = interleaved({provider: partial(head, hidden, weight) for provider, head in heads.items()}, device, rounds)
    both = interleaved(passes, device, rounds)
    timed_rows: list[BenchRow] = []
    for name in heads:
        memory = float(extra_bytes(passes[name], hidden, weight)) if device.type == "cuda" else None
        labels = {"shape": shape.name, "provider": name, "status": "ok"}
        timed_rows += rows_of(f"{shape.name} {name} ", FORWARD, forward[name], labels, errors[name])
        timed_rows += rows_of(f"{shape.name} {name} ", BOTH, both[name], labels, errors[name] | {"extra_bytes": memory})
    return timed_rows + refused


def rows_of(
    prefix: str,
    name: str,
    samples: Sequence[StreamSample],
    labels: Mapping[str, str],
    extra: Mapping[str, float | None],
) -> list[BenchRow]:
    """Return the row of a call's times, `extra` with the share of samples in which a GPU had to wait for the host; and,
    of a GPU, the row of the host's times."""
    hosts = [sample.host_milliseconds for sample in samples if sample.host_milliseconds is not None]
    starved = {"starved": sum(sample.starved for sample in samples) / len(samples)} if hosts else {}
    times = [sample.milliseconds for sample in samples]
    row = make_row(prefix + name, "ms", times, labels={**labels, "pass": name}, extra={**extra, **starved})
    host = make_row(prefix + name + HOST, "ms", hosts, labels={**labels, "pass": name + HOST})
    return [row, host] if hosts else [row]


def with_gradients(head: Head, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Run a head forward and backward: its loss [], and the gradients of hidden [T, H] and weight [V, H]."""
    loss = head(hidden, weight)
    return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])


def true_values(hidden: Tensor, weight: Tensor, batch: HeadBatch) -> tuple[Tensor, ...]:
    """Return the loss and both gradients in fp64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    return with_gradients(lambda states, matrix: true_loss(states, matrix, batch), hidden, weight)


def errors_of(found: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
    """Return the relative distances from fp64 of a loss and the gradients of hidden states and weight."""
    pairs = zip(("error_loss", "error_hidden", "error_weight"), found, truth, strict=True)
    return {name: float((ours.double() - true).norm() / true.norm()) for name, ours, true in pairs}


def largest(errors: Mapping[str, float]) -> float:
    """Return the worst error; NaN counts as infinite."""
    return max(inf if isnan(error) else error for error in errors.values())


def interleaved(calls: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, list[StreamSample]]:
    """Return the samples of every call, once per round, after rounds to warm up."""
    if device.type == "cuda":
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        takers = {name: StreamTimer(call, flush.zero_).sample for name, call in calls.items()}
    else:
        takers = {name: partial(sample_on_cpu, call) for name, call in calls.items()}
    return take_turns(takers, rounds, WARMUP_ROUNDS)


def sample_on_cpu(call: Call) -> StreamSample:
    """Time the call once, by the clock."""
    return StreamSample(timed(call)[1] * 1e3)


def extra_bytes(call: Call, hidden: Tensor, weight: Tensor) -> int:
    """Return the peak bytes of forward and backward, without what was there before and without the two gradients."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes)


def bench_parts(device: torch.device, rounds: int) -> list[BenchRow]:
    """Time `vp_logprob_` forward and backward, a copy of the logits, and `dpo_loss` of 8 pairs, which makes its
    gradient; each row with the bytes that it cannot avoid moving."""
    num_rows, columns = (8192, 32000) if device.type == "cuda" else (32, 101)
    generator = torch.Generator(device).manual_seed(0)
    options = {"device": device, "generator": generator}
    logits = torch.randn(num_rows, columns, dtype=DTYPES[device.type], **options).requires_grad_()
    other = torch.empty_like(logits)
    target = torch.randint(columns, (num_rows,), **options)
    shape = HeadShape("parts", 8, num_rows // 16, 1, columns)
    batch = make_batch(shape, device)
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
        row for name in calls for row in rows_of(ALONE, name, samples[name], {}, {"useful_bytes": float(useful[name])})
    ]


def tflops(shape: HeadShape, milliseconds: float) -> float:
    """Return the useful TFLOP/s of forward and backward: three products of [N, H] and [V, H], completion rows only."""
    return 6 * shape.num_rows * shape.hidden_size * shape.vocab_size / milliseconds / 1e9


def as_text(record: BenchRecord, shapes: Mapping[str, HeadShape]) -> str:
    """Return the record as Markdown tables: every provider on every shape, then single kernels."""
    hosts = {row.name.removesuffix(HOST): spread(row, ".3f") for row in record.rows if row.name.endswith(HOST)}
    rows = [row for row in record.rows if not row.name.endswith(HOST)]
    of_heads = [row for row in rows if "provider" in row.labels]
    heads = [["shape", "provider", "forward", "forward + backward", "host", "TFLOP/s", "extra GB", "off fp64"]]
    by_head = groupby(of_heads, key=lambda row: itemgetter("shape", "provider", "status")(row.labels))
    for (shape, provider, status), group in by_head:
        own = list(group)  # one where the provider was not timed
        forward, both = own[0], own[-1]
        cells = [status, "", "", "", ""]
        if both.median is not None:
            rate, memory = tflops(shapes[shape], both.median), both.extra["extra_bytes"]
            gigabytes = "" if memory is None else f"{memory / 1e9:.2f}"
            cells = [time_of(forward), time_of(both), hosts.get(both.name, ""), f"{rate:.1f}", gigabytes]
        errors = {name: error for name, error in both.extra.items() if name.startswith("error") and error is not None}
        heads.append([shape, provider, *cells, f"{largest(errors):.1e}" if errors else ""])
    parts = [["alone", "ms", "host", "GB/s"]]
    for row in rows[len(of_heads) :]:
        rate = (row.extra["useful_bytes"] or 0) / (row.median or inf) / 1e6
        parts.append([row.name.removeprefix(ALONE), time_of(row), hosts.get(row.name, ""), f"{rate:.1f}"])
    title = f"DPO head on {record.device}, {record.settings['dtype']}; ms: median [p10, p90]"
    smoke = "No GPU: tiny shapes in fp32 on the CPU, where ours is the plain reference. No figure counts."
    starved = "*: the GPU waited for the host in some samples; its time there contains the host's."
    texts = [title, markdown(heads), markdown(parts)]
    texts += [starved] if any(row.extra.get("starved") for row in rows) else []
    texts += [] if record.settings["on_gpu"] else [smoke]
    return "\n\n".join(texts)


def time_of(row: BenchRow) -> str:
    """Return a row's time, with a mark where the GPU waited for the host."""
    return spread(row, ".3f") + ("*" if row.extra.get("starved") else "")
