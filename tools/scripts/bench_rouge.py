"""python tools/scripts/bench_rouge.py: the ROUGE-L filter of new prompts, against rouge-score on a sample of its pairs.

Prompts are generated here: openings that many share, words by Zipf's law, lengths and near-duplicates as bootstrapped
lists have them. Seconds are CPU time of one thread, and methods take turns, so that other work on the machine matters
little. The filter is checked on the way: rouge-score on sampled pairs, rapidfuzz on whole pools for sampled prompts.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, nan
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist
from rouge_score.rouge_scorer import RougeScorer

from srlm_mega.data.rouge import RougePool, rouge_words
from srlm_mega.tools.bench_record import BenchRecord, make_record, make_row, write_record
from srlm_mega.tools.bench_timing import timed

THRESHOLD = 0.7
SEEDS_PER_PROMPT = 0.16  # 3,200 to 20,000 prompts, in proportion, so that comparing all takes the square
FILTER, TIMES, WHOLE_POOL = "filter of", "times rouge-score,", "every prompt against the whole pool"
CORES = 2  # rouge-score is credited with as many, srlm uses one
VOCABULARY = 30000
OPENINGS = (
    "Write a short story about", "Explain the difference between", "What are the benefits of", "Give me a list of",
    "How do I", "Describe the process of", "Summarize the following text about", "Translate this sentence about",
    "Create a plan for", "Suggest names for", "What is the meaning of", "Rewrite the paragraph on",
    "Compare and contrast", "Generate a headline for", "Why does", "Who was the first to", "Imagine you are a",
    "Come up with a recipe for", "Classify the following items by", "Find the error in",
)  # fmt: skip


@dataclass(frozen=True)
class FilterSample:
    """One run of the filter, and of rouge-score on a sample of its pairs right after it. `comparisons` is the number of
    pairs when each prompt is compared with all texts known before it."""

    num_generated: int
    num_seeds: int
    accepted: int
    comparisons: int
    seconds: float
    rouge_score_pairs: int
    rouge_score_seconds: float

    @property
    def ratio(self) -> float:
        """Comparisons per second, divided by those of rouge-score on `CORES` cores."""
        return self.comparisons / self.seconds / (CORES * self.rouge_score_pairs / self.rouge_score_seconds)


def main(
    generated: Annotated[list[int] | None, typer.Option(help="Prompts to filter; may be repeated.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Times that all sizes take turns.")] = 3,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs that rouge-score is timed on, each time.")] = 20000,
    json: Annotated[Path | None, typer.Option(help="Write everything, with raw samples, to this file.")] = None,
) -> None:
    """Time the ROUGE-L filter of new prompts against the rouge-score package (pip install rouge-score)."""
    sizes = generated or [5000, 10000, 20000]
    texts = prompts(num_seeds(max(sizes)) + max(sizes), random.Random(0))
    samples: dict[int, list[FilterSample]] = {size: [] for size in sorted(sizes)}
    for repetition in range(repetitions):
        for size in sizes:
            sample = one_sample(texts[: num_seeds(size) + size], num_seeds(size), random.Random(repetition), pairs)
            print(as_line(sample), flush=True)
            samples[size].append(sample)
    checked = check_decisions(texts, random.Random(1))
    seconds = whole_pool_seconds(texts, num_seeds(max(sizes)))
    record = record_of(samples, checked, seconds, len(texts))
    print(as_text(record), flush=True)
    write_record(record, json)


def num_seeds(num_generated: int) -> int:
    """Return the number of texts that are known before the first generated one."""
    return round(SEEDS_PER_PROMPT * num_generated)


def prompts(number: int, rng: random.Random) -> list[str]:
    """Make instructions of 3 to 145 words; one in seven is an earlier one with up to a third of its words changed."""
    draws = np.random.default_rng(rng.randrange(2**32))
    weights = 1 / (np.arange(VOCABULARY) + 2.7) ** 1.05
    weights /= weights.sum()
    texts: list[str] = []
    for _ in range(number):
        if texts and rng.random() < 1 / 7:
            words = rng.choice(texts).split()
            for _ in range(rng.randint(0, max(1, len(words) // 3))):
                words[rng.randrange(len(words))] = f"w{rng.randrange(VOCABULARY)}"
            texts.append(" ".join(words))
        else:
            size = min(140, max(2, int(rng.lognormvariate(2.5, 0.7))))
            words = [f"w{number}" for number in draws.choice(VOCABULARY, size=size, p=weights)]
            texts.append(f"{rng.choice(OPENINGS)} {' '.join(words)}")
    return texts


def one_sample(texts: Sequence[str], seeds: int, rng: random.Random, num_pairs: int) -> FilterSample:
    """Filter everything after the seeds, then time rouge-score on random pairs of the filter's texts."""
    accepted: list[str] = []
    comparisons = 0
    begin = time.process_time()
    pool = RougePool(THRESHOLD, texts[:seeds])
    for text in texts[seeds:]:
        comparisons += len(pool)
        if not pool.has_similar(text):
            pool.add(text)
            accepted.append(text)
    seconds = time.process_time() - begin
    known = [*texts[:seeds], *accepted]
    pairs = [(rng.choice(texts[seeds:]), rng.choice(known)) for _ in range(num_pairs)]
    scorer_seconds = rouge_score_seconds(pairs)
    return FilterSample(len(texts) - seeds, seeds, len(accepted), comparisons, seconds, num_pairs, scorer_seconds)


def rouge_score_seconds(pairs: Sequence[tuple[str, str]]) -> float:
    """Return the seconds of rouge-score for all pairs; each must get the F1 that the pool's definition gives it."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores, seconds = timed(lambda: [scorer.score(*pair)["rougeL"].fmeasure for pair in pairs], time.process_time)
    for (first, second), score in zip(pairs, scores, strict=True):
        one, other = rouge_words(first), rouge_words(second)
        expected = 2 * LCSseq.similarity(one, other) / (len(one) + len(other))
        assert abs(score - expected) < 1e-9, f"rouge-score says {score}, 2 * LCS / words is {expected}: {first!r}"
    return seconds


def check_decisions(texts: Sequence[str], rng: random.Random, number: int = 1000) -> int:
    """Check the pool's answers for some prompts by comparing each with every text before it; returns how many."""
    places = sorted(rng.sample(range(len(texts)), min(number, len(texts))))
    characters: dict[str, str] = {}
    encoded = [
        "".join(characters.setdefault(word, chr(0xE000 + len(characters))) for word in rouge_words(text))
        for text in texts
    ]
    lengths = np.asarray([len(text) for text in encoded])
    pool, similar = RougePool(THRESHOLD), 0
    for place in places:
        for text in texts[len(pool) : place]:
            pool.add(text)
        common = cdist([encoded[place]], encoded[:place], scorer=LCSseq.similarity, dtype=np.int32)[0]
        expected = bool((2 * common / (lengths[place] + lengths[:place]) > THRESHOLD).any())
        assert pool.has_similar(texts[place]) == expected, f"all pairs say {expected} for {texts[place]!r}"
        similar += expected
    assert 0 < similar < len(places), "all the same answer: the check could not fail"
    return len(places)


def whole_pool_seconds(texts: Sequence[str], seeds: int) -> float:
    """Return the seconds of every generated prompt against a pool of all texts, which has itself too."""
    begin = time.process_time()
    pool = RougePool(THRESHOLD, texts)
    assert all(pool.has_similar(text) for text in texts[seeds:]), "each text is in the pool"
    return time.process_time() - begin


def exponent(seconds: Mapping[int, float]) -> float:
    """Return the power by which seconds grow from the smallest to the largest number of prompts; NaN for one."""
    few, many = min(seconds), max(seconds)
    return log(seconds[many] / seconds[few]) / log(many / few) if few < many else nan


def as_line(sample: FilterSample) -> str:
    """Return a sample as a line for a terminal."""
    return (
        f"{sample.num_generated:>7,} prompts, {sample.accepted:,} accepted: {sample.comparisons:.3g} comparisons in "
        f"{sample.seconds:.2f} s; rouge-score {sample.rouge_score_pairs / sample.rouge_score_seconds:,.0f} pairs/s: "
        f"{sample.ratio:,.0f} times {CORES} cores of it"
    )


def record_of(
    samples: Mapping[int, Sequence[FilterSample]], decisions: int, pool_seconds: float, pool_texts: int
) -> BenchRecord:
    """Return the record: the filter and rouge-score at every number of prompts, and the whole pool's seconds."""
    rows = []
    for size, taken in samples.items():
        first, name = taken[0], f"{size} prompts"
        counts = {"seeds": first.num_seeds, "accepted": first.accepted, "comparisons": first.comparisons}
        scorer, pairs = [one.rouge_score_seconds for one in taken], {"pairs": first.rouge_score_pairs}
        rows += [
            make_row(f"{FILTER} {name}", "s", [one.seconds for one in taken], extra=counts),
            make_row(f"rouge-score beside {name}", "s", scorer, "neither", extra=pairs),
            make_row(f"{TIMES} {name}", "ratio", [one.ratio for one in taken], "higher"),
        ]
    everything = [sample for taken in samples.values() for sample in taken]
    speed = median(sample.rouge_score_pairs / sample.rouge_score_seconds for sample in everything)
    times = max(samples) * pool_texts / pool_seconds / (CORES * speed)
    rows.append(make_row(WHOLE_POOL, "s", [pool_seconds], extra={"times": times}))
    medians = {size: median(sample.seconds for sample in taken) for size, taken in samples.items()}
    settings = {
        "threshold": THRESHOLD,
        "exponent": exponent(medians),  # seconds grow with the number of prompts to this power
        "checked_pairs": sum(sample.rouge_score_pairs for sample in everything),  # these two without a difference
        "checked_decisions": decisions,
    }
    return make_record("rouge", settings, rows, ("rapidfuzz", "rouge-score"))


def as_text(record: BenchRecord) -> str:
    """Return the record as text for a terminal."""
    times = [row for row in record.rows if row.name.startswith(TIMES)][-1]
    pool, settings = record.row(WHOLE_POOL), record.settings
    return (
        f"one core of srlm is {times.median:,.0f} times as fast as {CORES} of rouge-score; seconds grow with the "
        f"number of prompts to the power {settings['exponent']:.2f}; every prompt against the whole pool: "
        f"{pool.samples[0]:.1f} s, {pool.extra['times']:,.0f} times; checked: {settings['checked_pairs']:,} "
        f"pairs, {settings['checked_decisions']:,} decisions"
    )


if __name__ == "__main__":
    typer.run(main)
