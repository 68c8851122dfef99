"""python tools/scripts/bench_pairs.py: seconds and memory of the pairs of many candidates, and of all judge metrics of
as many ranked replies.
"""

import multiprocessing
import os
import random
import resource
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from srlm_mega.config.rounds import PairsConfig
from srlm_mega.evaluation.judge_metrics import RankedScore, judge_metrics
from srlm_mega.judging.pair_counts import PairCounter, pairs_of
from srlm_mega.judging.rewards import read_rewards
from srlm_mega.judging.scored_candidates import scored_prompts
from srlm_mega.records import Candidate, Decoding, Judgement, read_jsonl, write_jsonl
from srlm_mega.tools.bench_record import make_record, make_row, write_record
from srlm_mega.tools.bench_timing import timed

PER_PROMPT, PER_CANDIDATE = 4, 3
RESPONSE_TOKENS, JUDGEMENT_TOKENS, CHARACTERS_PER_TOKEN = 270, 120, 4
WORD = "abc "
TOKENS = tuple(random.Random(2).choices(range(32000), k=100_000))


@dataclass(frozen=True)
class PartCost:
    """The cost of one part, in a process of its own and those that it starts; the peak includes Python's libraries."""

    seconds: float
    processor_seconds: float  # of all its processes; on a busy machine it also waits
    peak_mib: float  # of all its processes together, were their peaks at one time
    rows: int


def main(
    candidates: Annotated[int, typer.Option(min=4, help="Four to a prompt, with three judgements each.")] = 1_000_000,
    json: Annotated[Path | None, typer.Option(help="Write what was measured to this file.")] = None,
) -> None:
    """Seconds and memory to make pairs of many candidates, and to measure a judge on as many replies. A million take
    8 GB of disk in the temporary folder, and several minutes to write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_judgements = write_round(folder, candidates)
        size = sum(path.stat().st_size for path in folder.iterdir())
        os.sync()  # a round's files were written long before; writing them out is not the work that is measured
        parts = {
            "pairs": measured(make_pairs, folder, candidates),
            "judge metrics": measured(measure_judge, folder, candidates),
        }
    for part, one in parts.items():
        taken = f"{one.seconds:7.1f} s, {one.processor_seconds:.1f} s of processor"
        print(f"{part:<14} {taken}  {one.peak_mib:7.0f} MiB  {one.rows:,} rows")
    settings = {
        "candidates": candidates,
        "judgements": num_judgements,
        "bytes": size,
        "response_tokens": RESPONSE_TOKENS,
        "judgement_tokens": JUDGEMENT_TOKENS,
    }
    rows = [make_row(part, "s", [one.seconds], extra=asdict(one)) for part, one in parts.items()]
    write_record(make_record("pairs", settings, rows), json)


def write_round(folder: Path, num_candidates: int) -> int:
    """Write candidates and judgements as a round writes them; returns the number of judgements."""
    rng = random.Random(0)
    write_jsonl(folder / "candidates.jsonl", (candidate(number, rng) for number in range(num_candidates)))
    judgements = (judgement(number, turn, rng) for number in range(num_candidates) for turn in range(PER_CANDIDATE))
    return write_jsonl(folder / "judgements.jsonl", judgements)


def candidate(number: int, rng: random.Random) -> Candidate:
    """Make a candidate of about the length that a 70B model's have."""
    tokens = rng.randint(1, 2 * RESPONSE_TOKENS)
    prompt = f"p{number // PER_PROMPT:07d}"
    return Candidate(
        id=f"{prompt}-c{number % PER_PROMPT}",
        prompt_id=prompt,
        prompt=WORD * 40,
        text=f"{rng.random()} " + WORD * (tokens * CHARACTERS_PER_TOKEN // len(WORD)),
        finish_reason="stop" if rng.random() > 0.01 else "length",
        seed=number,
        model_hash="0" * 32,
        prompt_token_ids=(17,) * 40,
        token_ids=some_tokens(rng, tokens),
        cumulative_logprob=-12.5,
        decoding=Decoding(0.7, 0.9, 2048),
    )


def judgement(number: int, turn: int, rng: random.Random) -> Judgement:
    """Make a judgement, mostly with a whole score."""
    tokens = rng.randint(1, 2 * JUDGEMENT_TOKENS)
    name = f"p{number // PER_PROMPT:07d}-c{number % PER_PROMPT}"
    return Judgement(
        id=f"{name}-j{turn}",
        candidate_id=name,
        text=WORD * (tokens * CHARACTERS_PER_TOKEN // len(WORD)),
        score=float(rng.randint(0, 5)) if rng.random() > 0.02 else None,
        finish_reason="stop",
        seed=number,
        model_hash="0" * 32,
        token_ids=some_tokens(rng, tokens),
        decoding=Decoding(0.7, 0.9, 512),
    )


def some_tokens(rng: random.Random, number: int) -> tuple[int, ...]:
    """Return token ids of a vocabulary of 32,000."""
    start = rng.randrange(len(TOKENS) - number)
    return TOKENS[start : start + number]


def measured(work: Callable[[Path, int], int], folder: Path, num_candidates: int) -> PartCost:
    """Measure a part in a fresh process, so that its memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(measure, work, folder, num_candidates).result()


def measure(work: Callable[[Path, int], int], folder: Path, num_candidates: int) -> PartCost:
    """Measure a part in this process, which has done nothing before."""
    start = sum(os.times()[:4])
    rows, seconds = timed(partial(work, folder, num_candidates))
    processor = sum(os.times()[:4]) - start
    kib = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return PartCost(round(seconds, 2), round(processor, 2), round(kib / 1024, 1), rows)


def make_pairs(folder: Path, num_candidates: int) -> int:
    """Do the work of the stage `pairs`: read, score, select, count, write. Returns the number of pairs."""
    counter = PairCounter()
    candidates = read_jsonl(folder / "candidates.jsonl", Candidate)
    prompts = scored_prompts(candidates, read_rewards(folder / "judgements.jsonl", 1))
    rows = write_jsonl(folder / "pairs.jsonl", pairs_of(prompts, PairsConfig(rho=0.2), 1, 0, counter))
    counts = counter.counts()
    assert counts.candidates == num_candidates and counts.pairs == rows, "every candidate was read"
    return rows


def measure_judge(folder: Path, num_candidates: int) -> int:
    """Compute all metrics of as many replies with ranks, scored in thirds. Returns the number of replies."""
    return judge_metrics(ranked_prompts(num_candidates // PER_PROMPT)).replies


def ranked_prompts(num_prompts: int) -> Iterator[list[RankedScore]]:
    """Yield prompts of four ranked replies, some of equal rank or without a score."""
    rng = random.Random(1)
    for _ in range(num_prompts):
        yield [
            (rng.randrange(PER_PROMPT), rng.randrange(16) / 3 if rng.random() > 0.02 else None)
            for _ in range(PER_PROMPT)
        ]


if __name__ == "__main__":
    typer.run(main)
