"""Reader of a round for the report. Its files may have millions of lines: they are read once, one line at a time."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from srlm_mega.records import lines_of, one_text
from srlm_mega.report.lineage_sample import LineageSample, PairLeaf
from srlm_mega.run.logs import read_metrics
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import CANDIDATES, JUDGEMENTS, PAIRS, PROMPTS, model_name


@dataclass(frozen=True, slots=True)
class DpoStep:
    """One optimiser step of a round's DPO. `loss`, `margin` (beta times the difference of log-ratios) and both rewards
    are in nats; `accuracy` is the share of pairs in the right order."""

    step: int
    loss: float
    margin: float
    accuracy: float
    chosen: float
    rejected: float


@dataclass(frozen=True)
class RoundPart:
    """The finished part of round t: M(t) writes and judges, DPO makes M(t+1). `scores` counts the judgements by score,
    those without one left out; `lengths` the candidates by number of tokens; `counts` has the fields of PairCounts, and
    is empty before the pairs are made."""

    number: int
    judgements: int
    scores: Mapping[float, int]
    lengths: Mapping[int, int]
    counts: Mapping[str, float]
    lineage: LineageSample
    dpo: tuple[DpoStep, ...]

    @property
    def scored(self) -> int:
        """Number of judgements with a score."""
        return sum(self.scores.values())


def read_round(run: RunDir, number: int, max_bytes: int) -> RoundPart:
    """Read one round, with as many of its texts as fit into `max_bytes`."""
    lineage = LineageSample(max_bytes)  # drops prompts while it grows, so parents are added before their children
    for prompt in lines(run, PROMPTS.of(number), "prompts.jsonl"):
        lineage.add_prompt(prompt["id"], one_text(prompt["text"], prompt.get("system", "")))
    lengths: Counter[int] = Counter()
    for one in lines(run, CANDIDATES.of(number), "candidates.jsonl"):
        lengths[len(one["token_ids"])] += 1
        lineage.add_candidate(one["prompt_id"], one["id"], one["text"], len(one["token_ids"]), one["finish_reason"])
    scores: Counter[float | None] = Counter()
    for one in lines(run, JUDGEMENTS.of(number), "judgements.jsonl"):
        scores[one["score"]] += 1
        lineage.add_judgement(one["candidate_id"], one["score"], one["text"])
    for one in lines(run, PAIRS.of(number), "pairs.jsonl"):
        ends = (one["chosen_id"], one["rejected_id"], one["chosen_score"], one["rejected_score"])
        lineage.add_pair(PairLeaf(one["id"], *ends))
    paired = run.manifest(PAIRS.of(number))
    trained = model_name(number + 1)
    return RoundPart(
        number=number,
        judgements=scores.total(),
        scores={score: count for score, count in scores.items() if score is not None},
        lengths=dict(lengths),
        counts={} if paired is None else paired.counts,
        lineage=lineage,
        dpo=() if run.manifest(trained) is None else read_dpo_steps(run.output(trained) / "metrics.jsonl"),
    )


def lines(run: RunDir, stage: str, file: str) -> Iterator[dict[str, Any]]:
    """Yield the records in a file of a stage, none when the stage is not finished. They are not validated again: that
    was done when they were written and when the next stage read them."""
    if run.manifest(stage) is None:
        return
    with (run.output(stage) / file).open("rb") as content:
        for line in lines_of(content, run.output(stage) / file):
            yield orjson.loads(line)


def read_dpo_steps(path: Path) -> tuple[DpoStep, ...]:
    """Read the steps of one model's DPO; a value that was not finite is NaN, a gap in the curve."""
    keys = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected")
    return tuple(
        DpoStep(int(step), *(math.nan if (value := row.get(key)) is None else value for key in keys))
        for row in read_metrics(path)
        if "rewards/margins" in row and (step := row.get("step")) is not None  # not a step of replayed EFT
    )
