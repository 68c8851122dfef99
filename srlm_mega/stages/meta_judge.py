"""Stage meta_judgements: the model compares its own judgements of a response; the best and the worst become a pair."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from srlm_mega.chat import Chat
from srlm_mega.judging.meta import (
    Contest,
    best_and_worst,
    comparisons,
    contest_of,
    elo,
    meta_template,
    most_pairs,
    position_weights,
)
from srlm_mega.judging.rewards import reward_of
from srlm_mega.judging.scored_candidates import judgements_by_candidate, score_candidate
from srlm_mega.judging.verdicts import verdict_of
from srlm_mega.records import (
    Candidate,
    Judgement,
    Message,
    MetaJudgement,
    PreferencePair,
    SampledText,
    read_jsonl,
    write_jsonl,
)
from srlm_mega.run.stage_kinds import CANDIDATES, JUDGEMENTS, PAIRS, model_name
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.stages.sampling_task import SampledBy, SamplingRequest, SamplingTask, judge_template
from srlm_mega.stages.sharded import sample_in_shards
from srlm_mega.stages.work import Done, Work

SPARE = 1.5  # responses that are compared per pair that can be used, as some end in a draw


@dataclass(frozen=True)
class JudgementComparison:
    """Two judgements of one response, in the order in which they are shown."""

    candidate_id: str
    first: Judgement
    second: Judgement


def judge_judgements(work: Work) -> Done:
    """Write `meta_judgements.jsonl` and `pairs.jsonl`, which may be empty: a round without such pairs continues."""
    task, too_long, contests = comparisons_task(work)
    if task.requests:
        sample_in_shards(work, task)
    else:
        write_jsonl(work.out / task.file, ())
    judged = list(read_jsonl(work.out / task.file, MetaJudgement))
    pairs = judgement_pairs(work, contests, judged)
    write_jsonl(work.out / "pairs.jsonl", pairs)
    counts: dict[str, float] = {
        "pairs": len(pairs),
        "responses": len(contests),
        "unparsed": sum(one.verdict is None for one in judged),
        "truncated": sum(one.finish_reason == "length" for one in judged),
        "first_wins": sum(one.verdict == "first" for one in judged),
        "second_wins": sum(one.verdict == "second" for one in judged),
        "too_long": too_long,
    }
    return Done(len(judged), counts)


def comparisons_task(work: Work) -> tuple[SamplingTask[JudgementComparison], int, list[Contest]]:
    """Return a task with a request per comparison, the number of those too long, and the contests that they decide."""
    settings, judge = work.config.judge, model_name(work.round)
    params = SamplingParams(1, settings.temperature, settings.top_p, settings.max_new_tokens, seed=0)
    by, template, contests = SampledBy.of_run(work, judge, params), meta_template(), contests_of(work)

    def request(contest: Contest, first: Judgement, second: Judgement) -> SamplingRequest[JudgementComparison]:
        values = {
            "instruction": contest.candidate.question,
            "response": contest.candidate.text,
            "first": first.text,
            "second": second.text,
        }
        name = f"{first.id}-over-{second.id}"
        compared = JudgementComparison(contest.candidate.id, first, second)
        return SamplingRequest(name, compared, by.chat.prompt(template.fill(values)))

    requests = [request(contest, *both) for contest in contests for both in comparisons(contest)]

    def records(
        request: SamplingRequest[JudgementComparison], completions: Sequence[SampledText]
    ) -> Iterator[MetaJudgement]:
        for completion in completions:
            fields = by.fields(completion)
            yield MetaJudgement(
                id=request.id,
                candidate_id=request.source.candidate_id,
                first_id=request.source.first.id,
                second_id=request.source.second.id,
                verdict=verdict_of(fields["text"], fields["finish_reason"]),
                **fields,
            )

    task = SamplingTask(judge, requests, params, records, "meta_judgements.jsonl", "comparisons")
    return *task.fitting(work.config), contests


def contests_of(work: Work) -> list[Contest]:
    """Return a response per prompt with its judgements, most varied scores first; as many as max_share can need."""
    judged_in = work.read(JUDGEMENTS.of(work.round), "judgements.jsonl")
    judgements = judgements_by_candidate(read_jsonl(judged_in, Judgement))
    candidates = read_jsonl(work.read(CANDIDATES.of(work.round), "candidates.jsonl"), Candidate)
    found: list[Contest] = []
    for _, group in groupby(candidates, lambda candidate: candidate.prompt_id):
        judged = [(candidate, judgements.take(candidate.id)) for candidate in group]
        min_valid = work.config.judge.min_valid
        contest = contest_of([(score_candidate(one, reward_of(one.id, own, min_valid)), own) for one, own in judged])
        if contest is not None:
            found.append(contest)
    found.sort(key=lambda contest: -contest.variance)
    return found[: math.ceil(SPARE * largest_number(work))]


def largest_number(work: Work) -> int:
    """Return how many pairs of judgements may join the round's pairs."""
    selected = work.run.manifest(PAIRS.of(work.round))
    assert selected is not None, "pairs are an input, so they are finished"
    return most_pairs(selected.rows, work.config.meta_judge.max_share)


def judgement_pairs(work: Work, contests: Sequence[Contest], judged: Sequence[MetaJudgement]) -> list[PreferencePair]:
    """Return a preference pair (the judge's prompt, its better and its worse judgement, token ids as they were sampled,
    Elo ratings as scores) for each response that has a better one, up to meta_judge.max_share of all pairs."""
    chat = Chat.from_folder(work.run.weights(model_name(work.round)))
    template, weights = judge_template(work), position_weights(judged)
    by_candidate: dict[str, list[MetaJudgement]] = {}
    for one in judged:
        by_candidate.setdefault(one.candidate_id, []).append(one)
    pairs: list[PreferencePair] = []
    for contest in contests:
        own = by_candidate.get(contest.candidate.id, [])
        ratings = elo([judgement.id for judgement in contest.judgements], own, weights)
        found = best_and_worst(contest, ratings, work.config.meta_judge.max_chosen_length)
        if found is None:
            continue
        best, worst = found
        prompt = template.fill(contest.candidate.question, contest.candidate.text)
        pair = PreferencePair(
            id=f"{contest.candidate.id}-meta",
            prompt=(Message("user", prompt),),
            chosen=(Message("assistant", best.text),),
            rejected=(Message("assistant", worst.text),),
            chosen_id=best.id,
            rejected_id=worst.id,
            chosen_score=ratings[best.id],
            rejected_score=ratings[worst.id],
            prompt_token_ids=chat.prompt(prompt),
            chosen_token_ids=best.token_ids,
            rejected_token_ids=worst.token_ids,
        )
        pairs.append(pair)
    return pairs[: largest_number(work)]
