"""Stages pairs (best against worst response) and positives (responses with a perfect score, for an ablation)."""

import random
from collections.abc import Iterator
from dataclasses import asdict, replace

from srlm_mega.errors import CannotContinue
from srlm_mega.judging.agreement import SCORE_TOLERANCE
from srlm_mega.judging.pair_counts import PairCounter, PairCounts, pairs_of
from srlm_mega.judging.rewards import read_rewards
from srlm_mega.judging.scored_candidates import ScoredCandidate, scored_prompts
from srlm_mega.judging.scores import MAX_SCORE
from srlm_mega.records import Candidate, read_jsonl, write_jsonl
from srlm_mega.run.stage_kinds import (
    ANCHOR_JUDGEMENTS,
    ANCHORS,
    CANDIDATES,
    JUDGEMENTS,
    PREVIOUS_JUDGEMENTS,
    StageKind,
    model_name,
)
from srlm_mega.run.work import Done, Work
from srlm_mega.seeds import derive_seed


def select_pairs(work: Work) -> Done:
    """Write `pairs.jsonl`: each prompt's best against worst response. CannotContinue below pairs.min_pairs."""
    settings, inputs = work.config.pairs, work.stage.inputs
    seed, counter = derive_seed(work.config.run.seed, work.stage.name), PairCounter()
    anchors = None
    if ANCHORS.of(work.round) in inputs:
        anchors = scored(work, ANCHORS, ANCHOR_JUDGEMENTS)
    earlier = PREVIOUS_JUDGEMENTS if settings.weighs_consistency(work.round) else None
    prompts = scored(work, CANDIDATES, JUDGEMENTS, earlier)
    write_jsonl(work.out / "pairs.jsonl", pairs_of(prompts, settings, work.round, seed, counter, anchors))
    judged = work.run.manifest(JUDGEMENTS.of(work.round))
    assert judged is not None, "judgements are an input, so they are finished"
    counts = replace(counter.counts(), judgements_truncated=int(judged.counts.get("truncated", 0)))
    if work.config.round.method == "dpo" and counts.pairs < settings.min_pairs:
        raise CannotContinue(too_few_pairs(work, counts))
    return Done(counts.pairs, asdict(counts))


def scored(
    work: Work, answers: StageKind, judgements: StageKind, earlier: StageKind | None = None
) -> Iterator[list[ScoredCandidate]]:
    """Yield a round's candidates with their rewards, prompt by prompt. `earlier`: judgements by the previous model."""
    min_valid = work.config.judge.min_valid
    return scored_prompts(
        read_jsonl(work.read(answers.of(work.round), "candidates.jsonl"), Candidate),
        read_rewards(work.read(judgements.of(work.round), "judgements.jsonl"), min_valid),
        () if earlier is None else read_rewards(work.read(earlier.of(work.round), "judgements.jsonl"), min_valid),
    )


def select_positives(work: Work) -> Done:
    """Write `positives.jsonl`: responses with a perfect mean score, each text once per prompt; of more than
    round.max_positives a seeded sample in the same order. CannotContinue when there are none."""
    settings = work.config.round
    found = [candidate for group in scored(work, CANDIDATES, JUDGEMENTS) for candidate in perfect(group)]
    kept = found
    if settings.max_positives is not None and len(found) > settings.max_positives:
        rng = random.Random(derive_seed(work.config.run.seed, work.stage.name))
        kept = [found[number] for number in sorted(rng.sample(range(len(found)), settings.max_positives))]
    if not kept:
        raise CannotContinue(
            f"no response of round {work.round} has a perfect mean score of {MAX_SCORE:g}, so there is nothing to add "
            f"to the seed. Read {work.run.output(JUDGEMENTS.of(work.round)) / 'judgements.jsonl'}; more "
            "prompts.per_round or candidates.n give more. Everything so far is kept."
        )
    write_jsonl(work.out / "positives.jsonl", kept)
    return Done(len(kept), {"perfect": len(found)})


def perfect(group: list[ScoredCandidate]) -> list[Candidate]:
    """Return a prompt's candidates with the highest possible score; of equal texts the first."""
    by_text: dict[str, Candidate] = {}
    for item in group:
        if item.score is not None and item.score >= MAX_SCORE - SCORE_TOLERANCE:
            by_text.setdefault(item.candidate.text, item.candidate)
    return list(by_text.values())


def too_few_pairs(work: Work, counts: PairCounts) -> str:
    """Return the message for too few pairs: the figures, and what to do."""
    judge = model_name(work.round) if work.config.judge.backend == "model" else "the random judge"
    folder = work.run.output(JUDGEMENTS.of(work.round))
    return (
        f"{counts.pairs} preference pairs from {counts.prompts} prompts, needed {work.config.pairs.min_pairs} "
        f"(pairs.min_pairs).\n"
        f"  judge {judge}: {counts.unparsed} of {counts.judgements} judgements have no `Score: x` that can be read, "
        f"{counts.judgements_truncated} of them cut at judge.max_new_tokens\n"
        f"  candidates: {counts.scored} of {counts.candidates} scored, {counts.truncated} truncated, "
        f"{counts.unscored} without a score\n"
        f"  prompts: {counts.tied} tied, {counts.small_gap} with too small a gap, {counts.identical} with identical "
        f"responses, {counts.too_few} with fewer than two scored responses, {counts.long_chosen} with too long ones\n"
        f"No score is invented. Read {folder / 'judgements.jsonl'}; train {judge} on (more) judging data, or raise "
        f"candidates.max_new_tokens where responses are cut. Everything so far is kept."
    )
