"""Records of one model's evaluation: `evaluation.json`, `samples.jsonl`, `judge_prompts.jsonl`; and `measured.json`
when a judge compares the samples."""

from dataclasses import dataclass

from pydantic import with_config

from srlm_mega.evaluation.lengths import LengthControlled, LengthStatistics
from srlm_mega.evaluation.win_rates import HeadToHead
from srlm_mega.records import STRICT

JUDGED_PROMPTS = "judge_prompts.jsonl"


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class JudgeMetrics:
    """Agreement of a judge with ranked replies; a metric is None without anything to average over. A pair is two scored
    replies of one prompt with different ranks; a prompt is usable when it has a pair. Replies without a score are left
    out, the rest of the prompt is used."""

    pair_acc_untied: float | None
    """Share of pairs in the right order, of those with different scores."""
    pair_acc_half: float | None
    """Share of all pairs in the right order, a tie counting one half."""
    pair_acc_strict: float | None
    """Share of all pairs in the right order, a tie counting as wrong."""
    tie_rate: float | None
    """Share of pairs with equal scores."""
    five_best: float | None
    """Share of replies ranked best, of those with the largest mean score, judge.max_score."""
    five_best_count: int
    """Number of replies with the largest mean score."""
    exact_match: float | None
    """Share of usable prompts whose pairs are all in the right order, without ties."""
    spearman_drop: float | None
    """Mean of Spearman's correlation over prompts where it is defined (two or more scored replies, not all equal)."""
    spearman_zero: float | None
    """Mean of Spearman's correlation over usable prompts, an undefined one counting 0."""
    kendall_drop: float | None
    """Mean of Kendall's tau-b over prompts where it is defined."""
    kendall_zero: float | None
    """Mean of Kendall's tau-b over usable prompts, an undefined one counting 0."""
    parse_failure: float | None
    """Share of replies without a score."""
    fully_parsed_prompts: float | None
    """Share of prompts with a score for every reply."""
    prompts: int
    usable_prompts: int
    replies: int
    pairs: int


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class EvaluationSample:
    """A model's responses to one held-out prompt; qualities (0-5) are None without ground truth."""

    prompt_id: str
    prompt: str
    greedy: str
    sampled: str
    quality_greedy: int | None
    quality_sampled: int | None


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class JudgedPrompt:
    """Pairs of one EFT-eval prompt's replies, summed over the replicates, where a score is the mean of `judgements`
    judgements: all of them, those in the right order, and those with equal scores."""

    prompt_id: str
    judgements: int
    pairs: int
    right: int
    tied: int


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class JudgedBy:
    """Metrics of a judge whose score is the mean of `judgements` judgements."""

    judgements: int
    metrics: JudgeMetrics


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of two models' responses by a judge, in both orders. Of `prompts`, those with a verdict in both orders
    make the result, None without any. `too_long` counts prompts that did not fit, `failed` those without an answer;
    `unparsed` and `truncated` count judgements (two per prompt). A head-to-head has the models' hashes."""

    ours: str
    theirs: str
    judge: str
    prompts: int
    too_long: int
    failed: int
    unparsed: int
    truncated: int
    result: HeadToHead | None
    length_controlled: LengthControlled | None
    ours_hash: str = ""
    theirs_hash: str = ""

    @property
    def left_out(self) -> str:
        """The prompts and judgements that did not count, in words."""
        return (
            f"{self.prompts} prompts; {self.too_long} too long for the judge, {self.failed} failed; "
            f"{self.unparsed} judgements without a verdict, {self.truncated} cut off"
        )


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class JudgementCounts:
    """Number of a model's judgements of EFT-eval's replies, of those without a score, and of those that were cut at the
    token limit, which have none either."""

    judgements: int
    unparsed: int
    truncated: int


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of a model, kept while a judge compares its samples."""

    lengths: tuple[int, ...]
    """Lengths of the sampled responses, in tokens."""
    too_long: int
    """Number of prompts left out because they do not fit."""
    judged: tuple[JudgedBy, ...]
    """Metrics by means of `judge.n` judgements, by single ones, and by `evaluation.judge_means`."""
    judgements: JudgementCounts | None = None
    """Counts of the judgements behind the metrics."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class ModelEvaluation:
    """Metrics of one model. Qualities are means (0-5); win, tie and loss are shares of prompts against M1's sampled
    responses, None for M1 itself. All five are None without ground truth."""

    model: str
    quality_greedy: float | None
    quality_sampled: float | None
    win_vs_m1: float | None
    tie_vs_m1: float | None
    loss_vs_m1: float | None
    judge: JudgeMetrics
    judge_single: JudgeMetrics
    """Metrics of the judge by one judgement instead of the mean of k."""
    mean_length: float
    """Mean length of a sampled response, in tokens."""
    judge_means: tuple[JudgedBy, ...] = ()
    """Metrics of the judge by means of other numbers of judgements."""
    against_m1: HeadToHead | None = None
    """Sampled responses against M1's by ground truth, with its interval; None for M1, and without ground truth."""
    pairwise: Comparison | None = None
    """Comparison with M1's sampled responses by a judge; None unless configured."""
    lengths: LengthStatistics | None = None
    """Lengths of the sampled responses."""
    judgements: JudgementCounts | None = None
    """Counts of the judgements behind the judge's metrics."""
