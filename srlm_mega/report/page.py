"""`report.html`: one self-contained page per run, without network, fonts or other files.

Everything the template prints passes `visible` and Jinja's autoescape. What report.js shows comes as gzipped JSON in
base64, has passed `visible` too, and enters the page as text only. The page's policy allows one script: ours, by its
hash. So a model's text is shown, and cannot act on the page, whatever it contains.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.evaluation.health_limits import health_table
from srlm_mega.evaluation.paper import NO_CLAIM, TABLES, is_llama2_70b
from srlm_mega.evaluation.results import EvaluationSample
from srlm_mega.records import read_jsonl
from srlm_mega.report.costs import SAMPLING_RATES, TRAINING_RATES, StageCost, stage_costs
from srlm_mega.report.drawing import Plot
from srlm_mega.report.explorer import PROMPTS_PER_PAGE, explorer
from srlm_mega.report.headlines import ACCURACY, QUALITY, findings, table_note
from srlm_mega.report.lineage_sample import Outcome
from srlm_mega.report.planned import planned_rows
from srlm_mega.report.plots import dpo_plots, judge_plot, lengths_plot, quality_plot, scores_plot, time_plot
from srlm_mega.report.round_parts import RoundPart, read_round
from srlm_mega.report.summary import Summary, build_summary, decimal, percent
from srlm_mega.run.files import write_atomic
from srlm_mega.run.plan import eft_source, plan
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import CANDIDATES, EVALUATION, SEED, SFT, model_name
from srlm_mega.text import duration, visible

SHOWN_PROMPTS = 6
SHOWN_PAIRS = 2
TEXT_BYTES = 24 * 2**20  # of all rounds' texts in the page, before compression
# Labels of the judge's metrics; the table has each by the mean of k judgements and by one alone.
JUDGE_METRICS = {
    "pair_acc_half": "pairs in order, a tie counting half",
    "pair_acc_untied": "pairs in order, ties left out",
    "pair_acc_strict": "pairs in order, a tie counting as wrong",
    "tie_rate": "pairs with equal scores",
    "exact_match": "prompts with all pairs in order",
    "five_best": "replies ranked best, of those with the largest score",
    "parse_failure": "replies without a score",
    "fully_parsed_prompts": "prompts with a score for every reply",
    "spearman_drop": "Spearman, undefined left out",
    "spearman_zero": "Spearman, undefined as 0",
    "kendall_drop": "Kendall's tau-b, undefined left out",
    "kendall_zero": "Kendall's tau-b, undefined as 0",
    "usable_prompts": "prompts behind all pairs in order, and behind undefined as 0",
}


@dataclass(frozen=True, slots=True)
class SideBySide:
    """One held-out prompt and each model's responses, by model name."""

    prompt: str
    responses: dict[str, EvaluationSample]


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder, from the stages that are finished, and return its path."""
    folder = RunDir(run)
    write_atomic(folder.report_file, render(run).encode())
    return folder.report_file


def render(run: Path) -> str:
    """Return the page as text; the same folder gives the same bytes."""
    folder = RunDir(run)
    config = load_config(folder.config_file)
    summary = build_summary(run)
    numbers = [number for number in range(1, config.run.rounds + 1) if CANDIDATES.of(number) in summary.seconds]
    rounds = [read_round(folder, number, TEXT_BYTES // len(numbers)) for number in numbers]  # equal shares of the page
    samples = read_samples(folder, summary)
    costs = stage_costs(folder, config)
    script, style = (asset(name) for name in ("report.js", "report.css"))
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=run.resolve().name,
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            style=style,
            summary=summary,
            findings=findings(summary),
            table_note=table_note(summary),
            scales={"quality": QUALITY, "share": ACCURACY},
            facts=facts(folder, config),
            is_control=config.judge.backend == "random",
            expected=[stage.model for stage in plan(config) if stage.kind is EVALUATION],
            figures=figures(summary, rounds, samples, costs),
            rounds=rounds,
            examples={part.number: [tree for tree in part.lineage.trees if tree.pair][:SHOWN_PAIRS] for part in rounds},
            explorer=explorer(rounds),
            samples=side_by_side(samples),
            judge_metrics=JUDGE_METRICS,
            cut_judgements={name: cut_judgements(folder, name) for name in summary.models},
            judgements_each=config.judge.n,
            outcomes=get_args(Outcome),
            prompts_per_page=PROMPTS_PER_PAGE,
            plan=planned_rows(folder, costs),
            paper=TABLES if is_llama2_70b(config.model) else (),
            no_claim=NO_CLAIM,
            health=health_table(folder, config.run.rounds),
            costs=costs,
            training_rates=TRAINING_RATES,
            sampling_rates=SAMPLING_RATES,
            device="process" if config.trainer.device == "cpu" else "GPU",
            config_text=folder.config_file.read_text(encoding="utf-8"),
        )
    )


def asset(name: str) -> Markup:
    """Read the style or the script; neither may contain what would end its HTML element."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    assert "</s" not in text, f"{name} would end its own element"
    return Markup(text)


def read_samples(folder: RunDir, summary: Summary) -> dict[str, list[EvaluationSample]]:
    """Read each evaluated model's responses to the held-out prompts, by model name."""
    return {
        name: list(read_jsonl(folder.output(EVALUATION.of(name)) / "samples.jsonl", EvaluationSample))
        for name in summary.models
    }


def side_by_side(samples: Mapping[str, Sequence[EvaluationSample]]) -> list[SideBySide]:
    """Return the first held-out prompts that every model answered, each with the models' first responses."""
    if not samples:
        return []
    first = {name: {row.prompt_id: row for row in reversed(rows)} for name, rows in samples.items()}
    prompts = {row.prompt_id: row.prompt for rows in samples.values() for row in rows}
    shared = [prompt_id for prompt_id in prompts if all(prompt_id in rows for rows in first.values())]
    return [
        SideBySide(prompts[prompt_id], {name: rows[prompt_id] for name, rows in first.items()})
        for prompt_id in shared[:SHOWN_PROMPTS]
    ]


def figures(
    summary: Summary,
    rounds: Sequence[RoundPart],
    samples: Mapping[str, Sequence[EvaluationSample]],
    costs: Sequence[StageCost],
) -> dict[str, list[Plot]]:
    """Draw the figures that the run has data for, by section of the page."""
    models, pairs, speed = [], [], []
    if summary.has_ground_truth:
        models.append(quality_plot(summary.models))
    if any(row.judge.pair_acc_half is not None for row in summary.models.values()):
        models.append(judge_plot(summary.models))
    if words := {name: Counter(len(row.sampled.split()) for row in rows) for name, rows in samples.items() if rows}:
        models.append(lengths_plot("lengths", "sampled response", "words", words))
    if scores := {part.number: part.scores for part in rounds if part.scores}:
        pairs.append(scores_plot(scores))
    if lengths := {model_name(part.number): part.lengths for part in rounds if part.lengths}:
        pairs.append(lengths_plot("candidates", "candidate", "tokens", lengths))
    steps = {part.number: part.dpo for part in rounds if part.dpo}
    if costs:
        speed.append(time_plot(costs))
    return {"models": models, "pairs": pairs, "dpo": dpo_plots(steps) if steps else [], "speed": speed}


def facts(run: RunDir, config: Config) -> dict[str, str]:
    """Return what a reader of the figures needs of the configuration and of the seed data, by their label in the page's
    head. Numbers of examples are those that there were: the configuration's are limits."""
    model, judge, candidates = config.model, config.judge, config.candidates
    return {
        "Rounds": f"{config.run.rounds}, seed {config.run.seed}",
        "Seed data": f"{config.seed_data.source}, {seed_counts(run, config)}",
        "M1": trained_on(run, config),
        "Model": f"{model.num_layers} layers, hidden size {model.hidden_size}, {model.vocab_size} tokens",
        "Candidates": f"{candidates.n} per prompt, T {candidates.temperature:g}, top-p {candidates.top_p:g}",
        "Judge": f"{judge.n} judgements per candidate, T {judge.temperature:g}, template {judge.template}",
        "DPO": f"beta {config.dpo.beta:g}, lr {config.dpo.lr:g}, batch {config.dpo.global_batch_size}",
    }


def cut_judgements(folder: RunDir, model: str) -> int | None:
    """Return how many of a model's judgements of EFT-eval were cut off; None where an older version evaluated it."""
    manifest = folder.manifest(EVALUATION.of(model))
    assert manifest is not None, "the summary has the models whose evaluation is finished"
    cut = manifest.counts.get("judgements_truncated")
    return None if cut is None else int(cut)


def seed_counts(run: RunDir, config: Config) -> str:
    """Return '12 IFT + 60 EFT', the examples that the finished stages found or built."""
    seed, eft = run.manifest(SEED.of(0)), run.manifest(eft_source(config))
    ift = "IFT not read yet" if seed is None else f"{seed.counts['ift.jsonl']:,} IFT"
    if not config.eft.enabled:
        return f"{ift}, no EFT"
    if eft is None:
        return f"{ift}, EFT not built yet"
    return f"{ift} + {eft.rows if config.builds_eft else eft.counts['eft_train.jsonl']:,} EFT"


def trained_on(run: RunDir, config: Config) -> str:
    """Return the number of examples that M1 was trained on, of those left out, and of its steps."""
    trained = run.manifest(SFT.of("M1"))
    if trained is None:
        return "not trained yet"
    steps, excluded = trained.counts.get("steps", 0), trained.counts.get("excluded", 0)
    left_out = f", {excluded:,} too long" if excluded else ""
    return f"{trained.rows:,} examples{left_out}, {steps:,} steps of {config.sft.global_batch_size}"


def metric(value: float | None, name: str) -> str:
    """Format a judge's metric: a correlation with three decimals, a share as a percentage, or a number."""
    if name == "usable_prompts":
        return f"{value:,}"
    return decimal(value, 3) if name.startswith(("spearman", "kendall")) else percent(value, 1)


def rate(value: float | None) -> str:
    """Format a number with three significant digits, or as an integer from 100; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _finalized(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(decimal=decimal, percent=percent, duration=duration, metric=metric, rate=rate)
    return environment
