"""A run's results as text: lengths, and metrics in the form of the paper's tables."""

from collections.abc import Iterator
from pathlib import Path

from srlm_mega.config.file import load_config
from srlm_mega.evaluation.intervals import Interval, estimate, of_score, read_accuracy_shares
from srlm_mega.evaluation.lengths import LengthStatistics, pair_lengths
from srlm_mega.evaluation.paper import NO_CLAIM, is_llama2_70b
from srlm_mega.evaluation.results import Comparison, JudgeMetrics, ModelEvaluation
from srlm_mega.records import PreferencePair, parse_line, read_jsonl
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import EVALUATION, PAIRS, model_name


def evaluations(run: RunDir) -> Iterator[tuple[int, ModelEvaluation]]:
    """Yield number and evaluation of every evaluated model, in order."""
    number = 0 if run.manifest(EVALUATION.of(model_name(0))) is not None else 1
    while run.manifest(EVALUATION.of(model_name(number))) is not None:
        path = run.output(EVALUATION.of(model_name(number))) / "evaluation.json"
        yield number, parse_line(ModelEvaluation, path.read_bytes())
        number += 1


def length_lines(folder: Path) -> Iterator[str]:
    """Yield lines with the lengths of each evaluated model's responses, and of each finished round's pairs."""
    run = RunDir(folder)
    for number, evaluation in evaluations(run):
        if evaluation.lengths is not None:
            yield f"{model_name(number)} responses: {described(evaluation.lengths)}"
        if run.manifest(PAIRS.of(number)) is not None:
            pairs = pair_lengths(read_jsonl(run.output(PAIRS.of(number)) / "pairs.jsonl", PreferencePair))
            yield f"round {number} chosen: {described(pairs.chosen)}"
            yield f"round {number} rejected: {described(pairs.rejected)}"
            yield f"round {number} the chosen one is longer in {pairs.chosen_longer:.1%} of {pairs.chosen.count} pairs"


def described(lengths: LengthStatistics) -> str:
    """Return mean and median in characters, and in tokens if known, as text."""
    tokens = ""
    if lengths.mean_tokens is not None:
        tokens = f", tokens mean {lengths.mean_tokens:.1f} median {lengths.median_tokens:g}"
    return f"characters mean {lengths.mean_characters:.1f} median {lengths.median_characters:g}{tokens}"


def run_as_markdown(folder: Path) -> str:
    """Return a run's tables as Markdown, for comparison with the paper's, or a line that says they are incomparable."""
    run = RunDir(folder)
    shape = load_config(run.config_file).model
    if not is_llama2_70b(shape):
        return (
            f"\n{folder} is no Llama 2 70B ({shape.num_layers} layers of {shape.hidden_size}): its numbers cannot be "
            "compared with the paper's. srlm report shows them"
        )
    lines = [
        "",
        f"{folder}: judging on EFT-eval",
        "",
        "| model | judgements | pairwise accuracy untied / half / strict | ties | 5-best (of) "
        "| exact match (prompts, also of zero) | spearman drop / zero | kendall drop / zero | parse failures "
        "| half: 95 % interval (prompts); chance 50 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    compared = []  # none unless a judge compares the models
    for number, evaluation in evaluations(run):
        folder = run.output(EVALUATION.of(model_name(number)))
        for one in evaluation.judge_means:
            by_prompt = read_accuracy_shares(folder, one.judgements)
            interval = None if by_prompt is None else estimate(by_prompt)
            lines.append(judge_line(model_name(number), one.judgements, one.metrics, interval))
        compared += [] if evaluation.pairwise is None else [evaluation.pairwise]
    if compared:
        lines += [
            "",
            "Head-to-head, both orders",
            "",
            "| models | judge | win / tie / loss % | prompts | score (95 %) |",
        ]
        lines += ["| --- | --- | --- | --- | --- |", *map(comparison_line, compared)]
    return "\n".join([*lines, "", NO_CLAIM])


def judge_line(model: str, judgements: int, metrics: JudgeMetrics, half: Interval | None) -> str:
    """Return a row of the paper's table of reward modelling, by every convention; `half` has the interval of pairwise
    accuracy with ties as halves."""
    cells = (
        model,
        str(judgements),
        f"{percent(metrics.pair_acc_untied)} / {percent(metrics.pair_acc_half)} / {percent(metrics.pair_acc_strict)}",
        percent(metrics.tie_rate),
        f"{percent(metrics.five_best)} ({metrics.five_best_count})",
        f"{percent(metrics.exact_match)} ({metrics.usable_prompts})",  # the zero columns divide by the same
        f"{decimal(metrics.spearman_drop)} / {decimal(metrics.spearman_zero)}",
        f"{decimal(metrics.kendall_drop)} / {decimal(metrics.kendall_zero)}",
        percent(metrics.parse_failure),
        "unknown" if half is None else f"{bounds(half)} ({half.n})",
    )
    return f"| {' | '.join(cells)} |"


def comparison_line(comparison: Comparison) -> str:
    """Return a row of the paper's head-to-head table."""
    result = comparison.result
    shares = (
        "–"
        if result is None
        else " / ".join(percent(share) for share in (result.win_rate, result.tie_rate, result.loss_rate))
    )
    prompts = 0 if result is None else result.prompts
    score = "–" if result is None else f"{percent(result.score)} ({bounds(of_score(result))})"
    return f"| {comparison.ours} vs {comparison.theirs} | {comparison.judge} | {shares} | {prompts} | {score} |"


def bounds(interval: Interval | None) -> str:
    """Return the ends of a share's interval as percentages; 'unknown' without them."""
    if interval is None or interval.low is None or interval.high is None:
        return "unknown"
    return f"{percent(interval.low)} to {percent(interval.high)}"


def percent(share: float | None) -> str:
    """Return a share as a percentage without its sign, as in the paper; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f}"


def decimal(value: float | None) -> str:
    """Return a correlation to three decimals; a dash for None."""
    return "–" if value is None else f"{value:.3f}"
