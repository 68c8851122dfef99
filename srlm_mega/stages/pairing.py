"""Stages pairs (best against worst response) and positives (responses with a perfect score, for an ablation)."""

import random
from collections.abc import Iterator
from dataclasses import asdict, replace

from srlm_mega.errors import CannotContinue
from srlm_mega.evaluation.health_limits import pair_counts, unknown_share
from srlm_mega.judging.agreement import SCORE_TOLERANCE
from srlm_mega.judging.meta import most_pairs
from srlm_mega.judging.pair_counts import PairCounter, PairCounts, pairs_of
from srlm_mega.judging.rewards import read_rewards
from srlm_mega.judging.scored_candidates import ScoredCandidate, scored_prompts
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
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.work import Done, Work

MAX_UNKNOWN = 0.05  # share of unknown tokens that explains bad answers


def select_pairs(work: Work) -> Done:
    """Write `pairs.jsonl`: each prompt's best against worst response. CannotContinue for fewer than pairs.min_pairs, or
    than fill a batch of DPO."""
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
    if work.config.round.method == "dpo":
        check_number(work, counts)
    return Done(counts.pairs, asdict(counts))


def check_number(work: Work, counts: PairCounts) -> None:
    """Raise CannotContinue when the pairs are too few to go on."""
    config, dpo = work.config, work.config.dpo
    of_judgements = most_pairs(counts.pairs, config.meta_judge.max_share) if config.meta_judge.enabled else 0
    if counts.pairs < config.pairs.min_pairs:
        needed = f"{config.pairs.min_pairs} (pairs.min_pairs)"
        raise CannotContinue(too_few_pairs(work, counts, needed))
    if counts.pairs + of_judgements < dpo.min_items:
        batch = f"dpo.global_batch_size={dpo.global_batch_size}, dpo.epochs={dpo.epochs}"
        needed = f"{dpo.min_items} (one batch: {batch}; fewer fill a smaller one)"
        raise CannotContinue(too_few_pairs(work, counts, needed))


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
    settings, best = work.config.round, work.config.judge.max_score
    found = [candidate for group in scored(work, CANDIDATES, JUDGEMENTS) for candidate in perfect(group, best)]
    kept = found
    if settings.max_positives is not None and len(found) > settings.max_positives:
        rng = random.Random(derive_seed(work.config.run.seed, work.stage.name))
        kept = [found[number] for number in sorted(rng.sample(range(len(found)), settings.max_positives))]
    if not kept:
        counts = pair_counts(work.run, work.round)
        cause = "" if counts is None else f"{first_cause(counts, unknown_share(work.run, work.round))} "
        raise CannotContinue(
            f"no response of round {work.round} has a perfect mean score of {best}, so there is nothing to add "
            f"to the seed. {cause}Read {work.run.output(JUDGEMENTS.of(work.round)) / 'judgements.jsonl'}; more "
            "prompts.per_round or candidates.n give more. Everything so far is kept."
        )
    write_jsonl(work.out / "positives.jsonl", kept)
    return Done(len(kept), {"perfect": len(found)})


def perfect(group: list[ScoredCandidate], best: int) -> list[Candidate]:
    """Return a prompt's candidates with the highest possible score; of equal texts the first."""
    by_text: dict[str, Candidate] = {}
    for item in group:
        if item.score is not None and item.score >= best - SCORE_TOLERANCE:
            by_text.setdefault(item.candidate.text, item.candidate)
    return list(by_text.values())


def too_few_pairs(work: Work, counts: PairCounts, needed: str) -> str:
    """Return the message for fewer pairs than `needed`: the figures, and what to do."""
    judge = model_name(work.round) if work.config.judge.backend == "model" else "the random judge"
    folder = work.run.output(JUDGEMENTS.of(work.round))
    unknown = unknown_share(work.run, work.round)
    return (
        f"{counts.pairs} preference pairs from {counts.prompts} prompts, needed {needed}. "
        f"{first_cause(counts, unknown)}\n"
        f"  tokens of the prompts: {0 if unknown is None else unknown:.1%} unknown\n"
        f"  candidates: {counts.scored} of {counts.candidates} scored, {counts.truncated} truncated, "
        f"{counts.empty} empty, {counts.duplicates} repeated, {counts.unscored} without a score\n"
        f"  judge {judge}: {counts.unparsed} of {counts.judgements} judgements have no `Score: x` that can be read, "
        f"{counts.judgements_truncated} of them cut at judge.max_new_tokens\n"
        f"  prompts: {counts.tied} tied, {counts.small_gap} with too small a gap, {counts.identical} with identical "
        f"responses, {counts.too_few} with fewer than two scored responses, {counts.long_chosen} with too long ones\n"
        f"No score is invented. Read {folder / 'judgements.jsonl'}. Everything so far is kept."
    )


def first_cause(counts: PairCounts, unknown: float | None) -> str:
    """Return the first cause of too few pairs, and what helps: each may bring about all that come after it. `unknown`:
    share of unknown tokens in the prompts."""
    candidates, judgements, prompts = counts.candidates, counts.judgements, counts.prompts
    if unknown is not None and unknown > MAX_UNKNOWN:
        return (
            f"The first cause: {unknown:.1%} of the prompts' tokens are unknown to the tokenizer. Give the tokenizer "
            "that the model was trained with, or prompts in a language that it knows."
        )
    causes = (
        (counts.truncated, candidates, "candidates were cut before their end", "Raise candidates.max_new_tokens, or "
         "train longer on answers (sft): such a model does not end them."),
        (counts.empty, candidates, "candidates are empty", "Read candidates.jsonl; train longer on answers (sft)."),
        (counts.duplicates, candidates, "candidates repeat another of their prompt", "Raise candidates.temperature."),
        (counts.judgements_truncated, judgements, "judgements were cut before their end", "Raise judge.max_new_tokens, "
         "or train the judge on (more) judging data (EFT)."),
        (counts.unparsed, judgements, "judgements have no score", "Train the judge on (more) judging data (EFT)."),
        (counts.tied, prompts, "prompts have candidates with equal scores only", "Raise judge.n or candidates.n, or "
         "train the judge on (more) judging data (EFT)."),
    )  # fmt: skip
    for part, whole, what, remedy in causes:
        if part > whole / 2:
            return f"The first cause: {part} of {whole} {what}. {remedy}"
    return "No single cause: train the judge on (more) judging data (EFT), or raise prompts.per_round or candidates.n."
