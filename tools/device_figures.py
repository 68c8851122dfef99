"""The main figures of `srlm bench device`, a line for each part, from the folder with its records."""

from collections.abc import Callable, Sequence
from pathlib import Path

from srlm_mega.tools.bench_record import BenchRecord, markdown, read_record, spread

Figure = Callable[[BenchRecord], str]


def device_figures(folder: Path) -> str:
    """Return the table; parts without a record are not measured yet."""
    files = {part: folder / f"{part}.json" for part, _, _ in FIGURES}
    records = {part: read_record(file) for part, file in files.items() if file.is_file()}
    rows = [("part", "figure", "measured")]
    for part, words, figure in FIGURES:
        rows.append((part, words, figure(records[part]) if part in records else "not yet"))
    first = next((where(record) for record in records.values()), "No GPU has run this yet.")
    return f"{first}\n\n{markdown(rows)}"


def where(record: BenchRecord) -> str:
    """Return the device, the date and the versions that matter most."""
    return f"{record.device}, {record.date[:10]}, torch {record.versions['torch']}; median [p10, p90]"


def of_row(name: str) -> Figure:
    """Return the figure of one row, with its unit; a dash where a cut-off record lacks it."""
    return lambda record: next((f"{spread(row)} {row.unit}" for row in record.rows if row.name == name), "–")


def quotient(name: str, other: str) -> Figure:
    """Return how many times one row's median is another's; a dash where one was not measured."""

    def figure(record: BenchRecord) -> str:
        found = {row.name: row.median for row in record.rows}
        above, below = found.get(name), found.get(other)
        return "–" if above is None or not below else f"{above / below:.2f}"

    return figure


def outcomes(record: BenchRecord) -> str:
    """Return how many tests passed, failed, and were skipped."""
    found = [row.labels["outcome"] for row in record.rows]
    return ", ".join(f"{found.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped"))


def stages(record: BenchRecord) -> str:
    """Return the seconds of all stages."""
    seconds = sum(row.median or 0.0 for row in record.rows)
    return f"{len(record.rows)} stages, {seconds:.0f} s, exit code {record.settings['exit_code']}"


def sums(record: BenchRecord) -> str:
    """Return the milliseconds over all lengths of each row."""
    return "; ".join(f"{row.name} {row.extra['sum'] or 0:.1f}" for row in record.rows if "sum" in row.extra)


def mfu(record: BenchRecord) -> str:
    """Return the model FLOP utilization where the peak of the device is known."""
    known = [row for row in record.rows if row.name == "MFU_causal"]
    return spread(known[0]) if known else "the peak of this device is not known"


BOTH = "forward + backward"
FIGURES: Sequence[tuple[str, str, Figure]] = (
    ("environment", "product of square matrices in bf16", of_row("bf16 product")),
    ("environment", "copy", of_row("copy, read and written")),
    ("kernel_tests", "tests of the kernels", outcomes),
    ("kernels", "DPO head of 7B, forward and backward", of_row(f"7b ours-save {BOTH}")),
    ("kernels", "the same, Liger's time / ours", quotient(f"7b liger {BOTH}", f"7b ours-save {BOTH}")),
    ("kernels", "the same with half the rows", quotient(f"7b-masked liger {BOTH}", f"7b-masked ours-save {BOTH}")),
    ("host_syncs", "the host waits in forward and backward", of_row("forward and backward")),
    ("training", "DPO step at 7B's width", of_row("useful_tokens/s/GPU")),
    ("training", "MFU, causal", mfu),
    ("memory", "measured peak / rehearsed", of_row("measured / rehearsed")),
    ("trl", "time of TRL's step with Liger / ours", of_row("TRL / ours")),
    ("trl", "difference of their losses", of_row("difference of losses")),
    ("sdpa_lengths", "all lengths, ms", sums),
    ("precision", "bf16 against fp32", outcomes),
    ("demo", "the loop with the huggingface sampler", stages),
    ("fp8", "time in bf16 / in FP8, Transformer Engine", quotient("step at trainer.fp8=null",
                                                                  "step at trainer.fp8=hybrid")),
)  # fmt: skip
