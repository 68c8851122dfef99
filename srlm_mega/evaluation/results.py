"""What the evaluation of one model leaves behind: `evaluation.json` and `samples.jsonl`, and `measured.json`
where a judge compares the samples."""

from dataclasses import dataclass

from pydantic import with_config

from srlm_mega.evaluation.lengths import LengthControlled, LengthStatistics
from srlm_mega.evaluation.win_rates import HeadToHead
from srlm_mega.records import STRICT


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class JudgeMetrics:
    """None where there is nothing to average over. A pair is two scored replies of one prompt with different ranks;
    a prompt is usable when it has a pair. Replies without a score are left out, the rest of the prompt is used."""

    pair_acc_untied: float | None
    """Pairs in the right order, of those with different scores."""
    pair_acc_half: float | None
    """The same over all pairs, a tie counting one half."""
    pair_acc_strict: float | None
    """The same over all pairs, a tie counting as wrong."""
    tie_rate: float | None
    """Pairs with equal scores."""
    five_best: float | None
    """Replies ranked best, of those with a mean score of 5."""
    five_best_count: int
    """Replies with a mean score of 5."""
    exact_match: float | None
    """Usable prompts whose pairs are all in the right order, no ties."""
    spearman_drop: float | None
    """Mean over prompts where the correlation is defined (two or more scored replies, not all equal)."""
    spearman_zero: float | None
    """Mean over all prompts, an undefined correlation counting 0."""
    kendall_drop: float | None
    """Kendall's tau-b; as spearman_drop."""
    kendall_zero: float | None
    """Kendall's tau-b; as spearman_zero."""
    parse_failure: float | None
    """Replies without a score."""
    fully_parsed_prompts: float | None
    """Prompts with a score for every reply."""
    prompts: int
    usable_prompts: int
    replies: int
    pairs: int


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class EvaluationSample:
    """A model's responses to one held-out prompt; qualities (0-5) are None where the world has no ground truth."""

    prompt_id: str
    prompt: str
    greedy: str
    sampled: str
    quality_greedy: int | None
    quality_sampled: int | None


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class JudgedBy:
    """The judge measured by means of `judgements` of its judgements."""

    judgements: int
    metrics: JudgeMetrics


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Comparison:
    """One model's responses against another's by a judge, in both orders. Of `prompts`, those with a verdict in both
    orders make the result; None without any. `too_long` and `failed` count prompts that the judge could not be asked
    about, or did not answer; `unparsed` and `truncated` count judgements (two per prompt)."""

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


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of a model besides its samples when a judge begins to compare them."""

    lengths: tuple[int, ...]
    """Of the sampled responses, in tokens."""
    too_long: int
    """Prompts left out."""
    judged: tuple[JudgedBy, ...]
    """By means of `judge.n` judgements, by single ones, and by `evaluation.judge_means`."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class ModelEvaluation:
    """One model's figures. Qualities are means (0-5); win, tie and loss are shares of prompts against M1's sampled
    responses, None for M1 itself. All five are None where the world has no ground truth."""

    model: str
    quality_greedy: float | None
    quality_sampled: float | None
    win_vs_m1: float | None
    tie_vs_m1: float | None
    loss_vs_m1: float | None
    judge: JudgeMetrics
    judge_single: JudgeMetrics
    """The same by one judgement instead of the mean of k."""
    mean_length: float
    """Tokens of a sampled response."""
    judge_means: tuple[JudgedBy, ...] = ()
    """The same by means of other numbers of judgements."""
    against_m1: HeadToHead | None = None
    """Sampled responses against M1's by ground truth, with its interval; None for M1, and without ground truth."""
    pairwise: Comparison | None = None
    """The same by a judge; None unless it was asked for."""
    lengths: LengthStatistics | None = None
    """Of the sampled responses."""
