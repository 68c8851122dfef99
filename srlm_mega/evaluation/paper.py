"""The paper's numbers, for comparison with a run of Llama 2 70B: arXiv 2401.10020v3 (v1 has other data and numbers).

Percentages unless a unit is named. The judges were GPT-4 (head-to-head, MT-Bench, AlpacaEval) in snapshots that the
paper does not name, and humans.
"""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

from srlm_mega.config.model_sizes import ModelSizes
from srlm_mega.config.training import ModelConfig

VERSION = "arXiv 2401.10020v3"
NO_CLAIM = (
    "The paper does not say how it counts ties, whether it averages judgements, nor which judge's snapshot compared: a "
    "match on one convention is no match."
)


# The columns of each table; rows are read by their names.
# 256 test prompts judged by GPT-4 in both orders, as numbers of prompts.
PaperHeadToHead = namedtuple("PaperHeadToHead", "left right wins ties losses")
# 50 instructions, three of the authors, against the SFT baseline.
PaperHuman = namedtuple("PaperHuman", "model win tie loss")
# AlpacaEval 2.0, 805 prompts: raw win rate (not length-controlled), mean length in characters.
PaperAlpacaEval = namedtuple("PaperAlpacaEval", "model win_rate mean_length")
# MT-Bench, of 10.
PaperMtBench = namedtuple(
    "PaperMtBench", "model overall writing roleplay reasoning math coding extraction stem humanities"
)
# Agreement with human rankings on EFT-eval. The paper does not say how it treats ties, nor whether it averages.
PaperJudge = namedtuple("PaperJudge", "model pairwise_accuracy five_best exact_match spearman kendall")
# Nine benchmarks; the base model's row is the Llama 2 paper's. The harness is not named.
PaperBenchmarks = namedtuple("PaperBenchmarks", "model arc_easy arc_challenge hellaswag siqa piqa gsm8k mmlu obqa nq")


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables: a title, and rows of one named tuple each."""

    title: str
    rows: tuple[Any, ...]

    @property
    def columns(self) -> list[str]:
        """Column headers, from the fields' names."""
        return [name.replace("_", " ") for name in self.rows[0]._fields]


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
TABLES = (
    PaperTable("Head-to-head by GPT-4, both orders, 256 prompts", HEAD_TO_HEAD),
    PaperTable("Human evaluation against the SFT baseline, %", HUMAN),
    PaperTable("AlpacaEval 2.0: raw win rate %, mean length in characters", ALPACA_EVAL),
    PaperTable("MT-Bench, of 10", MT_BENCH),
    PaperTable("Judging: agreement with human rankings on EFT-eval, % and correlations", JUDGE),
    PaperTable("Judging by prompt, %", JUDGE_PROMPTS),
    PaperTable("Benchmarks, %", BENCHMARKS),
)


def is_llama2_70b(model: ModelConfig) -> bool:
    """Tell whether a configured shape is that of the paper's model."""
    plain_rope = model.rope_scaling is None and model.rotary_base == 10000.0
    return plain_rope and model.sizes == ModelSizes(80, 8192, 28672, 64, 8, 32000)


def as_markdown() -> str:
    """Return all tables as Markdown."""
    parts = [f"The paper's numbers ({VERSION})"]
    for table in TABLES:
        lines = [table.columns, ["---"] * len(table.columns), *(map(str, row) for row in table.rows)]
        parts.append(f"{table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)
