"""python tools/scripts/plot_bench.py FILE IMAGE: draws a record of `srlm bench kernels` or `training` with --sweep.

Kernels: time and memory of every provider against tokens and against vocabulary. Training: speed, step time and memory
against the value that was swept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from srlm_mega.errors import UserError
from srlm_mega.tools.bench_record import BenchRecord, BenchRow, read_record

PROVIDER_AXES = {"tokens-": "positions T", "vocab-": "vocabulary V"}
PROVIDER_VALUES = ("forward + backward, ms", "extra memory, GB")
SWEEP_LINES = ("tokens/s/GPU", "useful_tokens/s/GPU")


def main(
    json: Annotated[Path, typer.Argument(help="A record of `srlm bench kernels` or `training` with --sweep.")],
    image: Annotated[Path, typer.Argument(help="For example kernels.svg.")],
) -> None:
    """Draw a sweep: time and memory against tokens and vocabulary (kernels), or the swept setting (training)."""
    draw(json).savefig(image)


def draw(json: Path) -> Figure:
    """Draw a record. UserError where it is no sweep, or of a benchmark without a plot."""
    record = read_record(json)
    match record.bench:
        case "kernels":
            if not any(row.labels.get("shape", "").startswith(tuple(PROVIDER_AXES)) for row in record.rows):
                raise UserError(f"{json} has no shapes named tokens-... or vocab-...: run `srlm bench kernels --sweep`")
            return draw_providers(record)
        case "training":
            if "sweep" not in record.settings:
                raise UserError(f"{json} is no sweep: run `srlm bench training CONFIG --sweep KEY=V1,V2,...`")
            return draw_sweep(record)
        case other:
            raise UserError(f"{json} is of the benchmark {other}, which has no plot: give one of kernels or training")


def draw_providers(record: BenchRecord) -> Figure:
    """Draw four panels: time and memory, against tokens and against vocabulary."""
    timed = [row for row in record.rows if row.labels.get("pass") == "forward + backward"]
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    for column, (prefix, label) in enumerate(PROVIDER_AXES.items()):
        swept = [row for row in timed if row.labels["shape"].startswith(prefix)]
        for line, value in enumerate(PROVIDER_VALUES):
            draw_provider_lines(panels[line][column], swept, value)
            panels[line][column].set(xlabel=label, ylabel=value)
    panels[0][0].legend()
    where = record.device if record.settings["on_gpu"] else f"{record.device}: these times say nothing"
    figure.suptitle(f"DPO head on {where}, {record.date[:10]}")
    return figure


def draw_provider_lines(axes: Axes, rows: Sequence[BenchRow], value: str) -> None:
    """Draw one line per provider; nothing where it was not measured."""
    for provider in dict.fromkeys(row.labels["provider"] for row in rows):
        own = sorted(
            (int(row.labels["shape"].rpartition("-")[2]), number)
            for row in rows
            if row.labels["provider"] == provider and (number := measured(row, value)) is not None
        )
        axes.plot([place for place, _ in own], [number for _, number in own], marker="o", label=provider)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def measured(row: BenchRow, value: str) -> float | None:
    """Return one of PROVIDER_VALUES: the median in ms, or GB."""
    if value == PROVIDER_VALUES[0]:
        return row.median
    extra = row.extra["extra_bytes"]
    return None if extra is None else extra / 1e9


def draw_sweep(record: BenchRecord) -> Figure:
    """Draw three panels. A line is the medians, its band from the 10th to the 90th percentile."""
    values = record.settings["sweep"]["values"]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    speed, step, memory = figure.subplots(1, 3)
    for name in SWEEP_LINES:
        draw_band(speed, rows_of(record, name), values, name)
    draw_band(step, rows_of(record, "step"), values, "step")
    for name in dict.fromkeys(row.labels["what"] for row in record.rows if row.unit == "GiB"):
        draw_band(memory, rows_of(record, name), values, name.removeprefix("memory/").removesuffix("_GiB"))
    for axes, label in ((speed, "tokens per second and device"), (step, "seconds per step"), (memory, "memory, GiB")):
        axes.set(xlabel=record.settings["sweep"]["key"], ylabel=label)
        axes.set_xticks(range(len(values)), values)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"srlm bench training on {record.devices} x {record.device}, {record.date[:10]}")
    return figure


def rows_of(record: BenchRecord, what: str) -> list[BenchRow]:
    """Return the rows of one figure, one per value of the sweep."""
    return [row for row in record.rows if row.labels.get("what") == what]


def draw_band(axes: Axes, rows: Sequence[BenchRow], values: Sequence[str], label: str) -> None:
    """Draw one line with its band."""
    places = [values.index(row.labels["at"]) for row in rows]
    low, median, high = np.array([(row.p10, row.median, row.p90) for row in rows], dtype=float).T
    axes.fill_between(places, low, high, alpha=0.2)
    axes.plot(places, median, marker="o", label=label)


if __name__ == "__main__":
    typer.run(main)
