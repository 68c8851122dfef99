"""`srlm bench sampling`: how fast the backend at hand samples the requests of a run's round 1, and another one in an
environment of its own.

The requests are the stages' own: n candidates of each prompt, k judgements of each candidate. Every repetition times
all methods one after the other, and ratios are taken within a repetition, so that other work on the machine slows all
of them alike. Methods draw differently, so rates count each one's own output tokens. Request by request takes every
tenth request only: without batches a rate does not depend on how many there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from srlm_mega.chat import Chat
from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.config.runtime import SamplerBackend, SamplerConfig
from srlm_mega.errors import UserError
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.backends import open_sampler
from srlm_mega.sampling.huggingface_sampler import automatic_device, left_padded
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.sample_and_judge import candidates_task, judgements_task
from srlm_mega.stages.work import Work
from srlm_mega.tools.bench_record import BenchRecord, BenchRow, make_record, make_row, markdown, write_record
from srlm_mega.tools.bench_sampler_process import Figures, Method, Prompts, sample_with, sampler_process
from srlm_mega.tools.bench_timing import timed

ONE_BY_ONE, FIXED_BATCHES = "generate, request by request", "generate, fixed batches"
OURS, NO_REUSE = "srlm", "srlm, every copy prefilled"
RATE, RATIO, AT_WORK, REUSED = "rate of", "faster than", "completions at work of", "reused prompt tokens of"


@dataclass(frozen=True)
class BenchPart:
    """The requests of one stage."""

    name: str
    prompts: Prompts
    params: SamplingParams

    @property
    def prompt_tokens(self) -> int:
        """Tokens to prefill where each distinct request is computed once."""
        return sum(len(prompt) for prompt in self.prompts)


@dataclass(frozen=True)
class Sample:
    """One method's run over one stage's requests."""

    repetition: int
    method: str
    part: str
    requests: int
    sequences: int
    prompt_tokens: int
    figures: Figures
    seconds: float


def measure(
    run_folder: Path,
    overrides: Sequence[str],
    prompts: int,
    repetitions: int,
    batch_sizes: Sequence[int],
    backend: SamplerBackend | None,
    json: Path | None,
) -> None:
    """Measure with the first `prompts` prompts of a run's round 1, print, and write the record to `json`. `backend`:
    another one to compare with, in the environment of sampler.python. UserError without that."""
    run = RunDir(run_folder)
    config = load_config(run.config_file, overrides)
    parts = requests_of(run, config, prompts)
    with ExitStack() as processes:
        ways = methods(run, config, batch_sizes, also_generate=backend is None)
        if backend is not None:
            if config.sampler.python is None:
                raise UserError(f"--backend {backend} needs its environment: sampler.python=PATH/bin/python")
            folder, other = run.weights("M1"), config.sampler.model_copy(update={"backend": backend})
            end_ids, threads = Chat.from_folder(folder).end_ids, torch.get_num_threads()
            process = sampler_process(config.sampler.python, other, folder, end_ids, threads)
            ways[backend] = processes.enter_context(process)
        samples = list(take_samples(parts, ways, repetitions))
    result = summed_up(run, config, parts, samples)
    print(as_text(result), flush=True)
    write_record(result, json)


def requests_of(run: RunDir, config: Config, prompts: int) -> list[BenchPart]:
    """Return the requests for candidates and judgements of round 1; the run must have its candidates."""

    def work(stage: str) -> Work:
        progress = Progress(run.root / "logs" / "bench.progress.json")
        return Work(
            run, config, find_stage(config, stage), run.partial(stage), progress, Samplers(config, run.replicas)
        )

    candidates, _ = candidates_task(work("round_1/candidates"))
    chosen = {request.id for request in candidates.requests[:prompts]}
    judgements, _ = judgements_task(work("round_1/judgements"))
    asked = [one.token_ids for one in candidates.requests if one.id in chosen]
    judged = [one.token_ids for one in judgements.requests if one.source.prompt_id in chosen]
    return [BenchPart("candidates", asked, candidates.params), BenchPart("judgements", judged, judgements.params)]


def methods(run: RunDir, config: Config, batch_sizes: Sequence[int], also_generate: bool) -> dict[str, Method]:
    """Return our sampler by batch size and without reuse of prefills; for the transformers backend, where it is wanted,
    also `generate` with the same model."""
    folder, settings = run.weights("M1"), config.sampler
    end_ids = Chat.from_folder(folder).end_ids

    def ours(sampler_config: SamplerConfig) -> Method:
        return partial(sample_with, open_sampler(sampler_config, folder, end_ids))

    whole = ours(settings)
    found: dict[str, Method] = {
        OURS: whole,
        NO_REUSE: lambda prompts, params: whole(*every_copy_alone(prompts, params)),
    }
    for size in batch_sizes:
        if size != settings.batch_size:
            found[f"{OURS}, batch_size={size}"] = ours(settings.model_copy(update={"batch_size": size}))
    if settings.backend == "huggingface" and also_generate:
        device = torch.device(automatic_device() if settings.device == "auto" else settings.device)
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto").to(device).eval()
        size = settings.batch_size
        found[ONE_BY_ONE] = lambda prompts, params: generate(model, end_ids, prompts, params, 1)
        found[FIXED_BATCHES] = lambda prompts, params: generate(
            model, end_ids, prompts, params, max(1, size // params.n)
        )
    return found


def every_copy_alone(prompts: Prompts, params: SamplingParams) -> tuple[Prompts, SamplingParams]:
    """Replace each request for n completions by n requests for one."""
    return [prompt for prompt in prompts for _ in range(params.n)], replace(params, n=1)


def generate(model: Any, end_ids: tuple[int, ...], prompts: Prompts, params: SamplingParams, batch: int) -> Figures:
    """Sample with transformers' own loop, `batch` prompts at a time in order."""
    settings = GenerationConfig(
        do_sample=True, temperature=params.temperature, top_p=params.top_p, top_k=0, num_return_sequences=params.n,
        max_new_tokens=params.max_new_tokens, eos_token_id=list(end_ids), pad_token_id=end_ids[0],
    )  # fmt: skip
    total = 0
    for first in range(0, len(prompts), batch):
        ids, mask = (tensor.to(model.device) for tensor in left_padded(prompts[first : first + batch]))
        with torch.inference_mode():
            rows = model.generate(ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1] :]
        # Tokens up to the first end token, that one included; what follows is padding.
        ends = torch.isin(rows, torch.tensor(end_ids, device=rows.device)).int()
        total += int((ends.cumsum(dim=1) - ends == 0).sum())
    return Figures(total)


def take_samples(parts: Sequence[BenchPart], by_name: Mapping[str, Method], repetitions: int) -> Iterator[Sample]:
    """Run all methods on all parts, repetition by repetition, after a warm-up of each."""
    for part in parts:
        for method in by_name.values():
            method(part.prompts[:2], part.params)
    for repetition in range(repetitions):
        for part in parts:  # methods follow one another on the same part: as close in time as can be
            for name, method in by_name.items():
                prompts = part.prompts[::10] if name == ONE_BY_ONE else part.prompts
                figures, seconds = timed(partial(method, prompts, part.params))
                sequences = len(prompts) * part.params.n
                prefilled = sum(map(len, prompts)) * (part.params.n if name == NO_REUSE else 1)
                yield Sample(repetition, name, part.name, len(prompts), sequences, prefilled, figures, seconds)


def rates(samples: Sequence[Sample], method: str) -> list[float]:
    """Return a method's output tokens per second of each repetition, over all parts."""
    found = []
    for repetition in sorted({sample.repetition for sample in samples}):
        mine = [one for one in samples if one.method == method and one.repetition == repetition]
        found.append(sum(one.figures.output_tokens for one in mine) / sum(one.seconds for one in mine))
    return found


def summed_up(run: RunDir, config: Config, parts: Sequence[BenchPart], samples: list[Sample]) -> BenchRecord:
    """Return the record: rates and ratios of whole repetitions, then every method on every part."""
    speeds = {name: rates(samples, name) for name in dict.fromkeys(sample.method for sample in samples)}
    rows = [make_row(f"{RATE} {name}", "tokens/s", speed, "higher") for name, speed in speeds.items()]
    for name, speed in speeds.items():
        if name != OURS:
            ratios = [ours / other for ours, other in zip(speeds[OURS], speed, strict=True)]
            rows.append(make_row(f"{RATIO} {name}", "ratio", ratios, "higher"))
    for name in speeds:
        for part in parts:
            rows += part_rows([one for one in samples if (one.method, one.part) == (name, part.name)])
    settings = {
        "sampler": config.sampler.model_dump(mode="json"),
        "model": str(run.weights("M1")),
        "threads": torch.get_num_threads(),
        # Prompt tokens without reuse by those with it.
        "prefill_saving": sum(part.prompt_tokens * part.params.n for part in parts)
        / sum(part.prompt_tokens for part in parts),
    }
    on_gpu = torch.cuda.is_available() and config.sampler.device != "cpu"
    device = str(torch.cuda.get_device_name()) if on_gpu else None
    return make_record("sampling", settings, rows, ("tensorrt-llm", "vllm"), device)


def part_rows(samples: Sequence[Sample]) -> list[BenchRow]:
    """Return rows of one method on one stage's requests: seconds and output tokens of each repetition."""
    first = samples[0]
    labels, name = {"method": first.method, "part": first.part}, f"{first.part}, {first.method}"
    counts = {"requests": first.requests, "sequences": first.sequences, "prompt_tokens": first.prompt_tokens}
    figures = [one.figures for one in samples]
    rows = [
        make_row(f"seconds of {name}", "s", [one.seconds for one in samples], "lower", labels, counts),
        make_row(f"output tokens of {name}", "tokens", [one.output_tokens for one in figures], "neither", labels),
    ]
    if figures[0].steps:
        at_work = [one.at_work / one.steps for one in figures]
        reused = [one.cached_tokens / one.prompt_tokens for one in figures]
        rows.append(make_row(f"{AT_WORK} {name}", "completions", at_work, "higher", labels))
        rows.append(make_row(f"{REUSED} {name}", "share", reused, "higher", labels))
    return rows


def as_text(record: BenchRecord) -> str:
    """Return the record as text for a terminal."""
    faster = {row.name.removeprefix(f"{RATIO} "): f"{row.median:.2f}" for row in record.rows if row.unit == "ratio"}
    rows = [("method", "output tokens/s", "srlm is faster by")]
    for row in record.rows:
        if row.unit == "tokens/s":
            name = row.name.removeprefix(f"{RATE} ")
            rows.append((name, f"{row.median:,.0f}", faster.get(name, "")))
    counted = [f"{row.name}: {row.median:.3g}" for row in record.rows if row.name.startswith((AT_WORK, REUSED))]
    whole = [row for row in record.rows if row.labels.get("method") == OURS and row.unit == "s"]
    requests, sequences = (sum(int(row.extra[key] or 0) for row in whole) for key in ("requests", "sequences"))
    return (
        f"{requests} requests for {sequences} completions, {len(whole[0].samples)} repetitions on {record.device}, "
        f"{record.settings['threads']} thread(s), load {record.load_average[0]:.1f}; medians\n\n{markdown(rows)}\n\n"
        f"prefill: {record.settings['prefill_saving']:.2f} times fewer prompt tokens than without reuse"
        + "".join(f"\n{line}" for line in counted)
    )
