"""What the evaluation of one model leaves behind: `evaluation.json` and `samples.jsonl`."""

from dataclasses import dataclass

from pydantic import with_config

from srlm_mega.evaluation.judge_metrics import JudgeMetrics
from srlm_mega.records import STRICT


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
    mean_length: float
    """Tokens of a sampled response."""
