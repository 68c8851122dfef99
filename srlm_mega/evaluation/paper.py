"""The paper's numbers, to be shown beside a run of Llama 2 70B: arXiv 2401.10020v3 (v1 has other data and numbers).

Percentages unless a unit is named. The judges were GPT-4 (head-to-head, MT-Bench, AlpacaEval) in snapshots that the
paper does not name, and people.
"""

from dataclasses import astuple, dataclass, fields
from typing import Any

from srlm_mega.config.training import ModelConfig

VERSION = "arXiv 2401.10020v3"
NO_CLAIM = (
    "The paper does not say how it counts ties, whether it averages judgements, nor which judge's snapshot compared: a "
    "match on one convention is no match."
)


@dataclass(frozen=True, slots=True)
class PaperHeadToHead:
    """256 test prompts judged by GPT-4 in both orders, as numbers of prompts."""

    left: str
    right: str
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True, slots=True)
class PaperHuman:
    """50 instructions, three of the authors, against the SFT baseline."""

    model: str
    win: int
    tie: int
    loss: int


@dataclass(frozen=True, slots=True)
class PaperAlpacaEval:
    """AlpacaEval 2.0, 805 prompts: raw win rate (not length-controlled), mean length in characters."""

    model: str
    win_rate: float
    mean_length: int


@dataclass(frozen=True, slots=True)
class PaperMtBench:
    """MT-Bench, of 10."""

    model: str
    overall: float
    writing: float
    roleplay: float
    reasoning: float
    math: float
    coding: float
    extraction: float
    stem: float
    humanities: float


@dataclass(frozen=True, slots=True)
class PaperJudge:
    """Agreement with human rankings on EFT-eval. The paper does not say how it treats ties, nor whether it averages."""

    model: str
    pairwise_accuracy: float
    five_best: float
    exact_match: float
    spearman: float
    kendall: float


@dataclass(frozen=True, slots=True)
class PaperBenchmarks:
    """Nine benchmarks; the base model's row is the Llama 2 paper's. The harness is not named."""

    model: str
    arc_easy: float
    arc_challenge: float
    hellaswag: float
    siqa: float
    piqa: float
    gsm8k: float
    mmlu: float
    obqa: float
    nq: float


HEAD_TO_HEAD = (
    PaperHeadToHead("M1", "SFT baseline", 78, 99, 79),
    PaperHeadToHead("M2", "SFT baseline", 126, 93, 37),
    PaperHeadToHead("M3", "SFT baseline", 160, 71, 25),
    PaperHeadToHead("M2", "M1", 142, 84, 30),
    PaperHeadToHead("M3", "M1", 176, 58, 22),
    PaperHeadToHead("M3", "M2", 122, 102, 32),
)
HUMAN = (PaperHuman("M1", 28, 26, 46), PaperHuman("M2", 56, 24, 20), PaperHuman("M3", 66, 16, 18))
ALPACA_EVAL = (
    PaperAlpacaEval("M1", 9.94, 1092),
    PaperAlpacaEval("M2", 15.38, 1552),
    PaperAlpacaEval("M3", 20.44, 2552),
)
MT_BENCH = (
    PaperMtBench("SFT baseline", 6.85, 8.83, 8.15, 5.30, 3.00, 3.50, 6.90, 9.18, 9.95),
    PaperMtBench("M1", 6.78, 9.10, 7.65, 4.35, 3.05, 4.10, 7.20, 8.93, 9.85),
    PaperMtBench("M2", 7.01, 9.10, 8.00, 4.60, 3.30, 4.25, 7.65, 9.40, 9.80),
    PaperMtBench("M3", 7.25, 9.58, 8.73, 4.80, 3.50, 4.20, 7.80, 9.45, 9.95),
)
JUDGE = (
    PaperJudge("SFT baseline", 65.1, 39.6, 10.1, 0.253, 0.233),
    PaperJudge("M1", 78.7, 41.5, 13.1, 0.279, 0.253),
    PaperJudge("M2", 80.4, 44.3, 14.3, 0.331, 0.315),
    PaperJudge("M3", 81.7, 43.2, 14.3, 0.349, 0.324),
)
JUDGE_PROMPTS = (
    PaperJudge("SFT baseline, multiple choice", 26.6, 23.5, 1.1, -0.18, -0.16),
    PaperJudge("SFT baseline, additive", 65.1, 39.6, 10.1, 0.25, 0.23),
)
BENCHMARKS = (
    PaperBenchmarks("Llama 2 70B", 80.20, 57.40, 85.30, 50.70, 82.80, 56.80, 68.90, 60.20, 25.30),
    PaperBenchmarks("SFT baseline", 76.49, 55.97, 85.17, 51.48, 82.59, 50.72, 69.76, 57.80, 34.35),
    PaperBenchmarks("M1", 78.14, 57.51, 84.99, 53.02, 82.92, 60.27, 69.34, 57.60, 35.48),
    PaperBenchmarks("M2", 74.84, 54.51, 84.27, 51.23, 81.94, 59.29, 69.31, 57.60, 33.07),
    PaperBenchmarks("M3", 72.35, 53.13, 83.29, 49.28, 80.79, 57.70, 69.37, 58.40, 31.86),
)
TABLES: dict[str, tuple[Any, ...]] = {
    "Head-to-head by GPT-4, both orders, 256 prompts": HEAD_TO_HEAD,
    "Human evaluation against the SFT baseline, %": HUMAN,
    "AlpacaEval 2.0: raw win rate %, mean length in characters": ALPACA_EVAL,
    "MT-Bench, of 10": MT_BENCH,
    "Judging: agreement with human rankings on EFT-eval, % and correlations": JUDGE,
    "Judging by prompt, %": JUDGE_PROMPTS,
    "Benchmarks, %": BENCHMARKS,
}


def is_llama2_70b(model: ModelConfig) -> bool:
    """Whether a configured shape is that of the paper's model."""
    return model.sizes == (80, 8192, 28672, 64, 8, 32000)


def as_markdown() -> str:
    """All tables."""
    parts = [f"The paper's numbers ({VERSION})"]
    for title, rows in TABLES.items():
        names = [field.name.replace("_", " ") for field in fields(rows[0])]
        lines = [names, ["---"] * len(names), *([str(value) for value in astuple(row)] for row in rows)]
        parts.append(f"{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)
