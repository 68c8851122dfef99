"""Stages candidates and judgements: the model answers new prompts and judges its own answers. Where configured, an
anchor model answers them too (anchors), and the previous model judges them too (previous_judgements).
"""

import random
from dataclasses import replace
from functools import partial
from typing import assert_never

from srlm_mega.chat import Chat
from srlm_mega.config.data import CandidatesConfig, JudgeConfig
from srlm_mega.judging.scores import score_variance
from srlm_mega.records import Candidate, Judgement, Prompt, read_jsonl
from srlm_mega.run.stage_kinds import ANCHOR_JUDGEMENTS, ANCHORS, CANDIDATES, PREVIOUS_JUDGEMENTS, PROMPTS, model_name
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.sampling.shards import Answered, Shard, run_shards
from srlm_mega.stages.sampling_task import (
    SampledBy,
    SamplingRequest,
    SamplingTask,
    candidates_of,
    judge_template,
    judgements_of,
)
from srlm_mega.stages.sharded import sample_in_shards, shard_files
from srlm_mega.stages.work import Done, Work


def sample_candidates(work: Work) -> Done:
    """Write `candidates.jsonl`: candidates.n responses to each prompt, by the round's model or its anchor."""
    task, too_long = candidates_task(work)
    sample_in_shards(work, task)
    candidates = list(read_jsonl(work.out / task.file, Candidate))
    truncated = sum(candidate.finish_reason == "length" for candidate in candidates)
    failed = len(task.requests) - len({candidate.prompt_id for candidate in candidates})
    unknown = Chat.from_folder(work.run.weights(task.model)).unk_id
    counts: dict[str, float] = {
        "truncated": truncated,
        "too_long": too_long,
        "failed": failed,
        "prompt_tokens": sum(len(request.token_ids) for request in task.requests),
        "unknown_tokens": sum(request.token_ids.count(unknown) for request in task.requests),
    }
    return Done(len(candidates), counts)


def judge_candidates(work: Work) -> Done:
    """Write `judgements.jsonl`: judge.n judgements of each candidate by a model or, as a control, at random."""
    match work.config.judge.backend:
        case "model":
            task, too_long = judgements_task(work)
            sample_in_shards(work, task)
            requested = len(task.requests)
        case "random":
            candidates, too_long = read_candidates(work), 0
            files = shard_files(work, candidates, "judgements.jsonl", each=work.config.judge.n)
            run_shards(files, partial(judge_at_random, work))
            requested = len(candidates)
        case other:
            assert_never(other)
    judgements = list(read_jsonl(work.out / "judgements.jsonl", Judgement))
    scores: dict[str, list[float | None]] = {}
    for judgement in judgements:
        scores.setdefault(judgement.candidate_id, []).append(judgement.score)
    variances = [variance for one in scores.values() if (variance := score_variance(one)) is not None]
    counts: dict[str, float] = {
        "unparsed": sum(judgement.score is None for judgement in judgements),
        "truncated": sum(judgement.finish_reason == "length" for judgement in judgements),
        "too_long": too_long,
        "failed": requested - len(scores),
    }
    if variances:
        counts["mean_variance"] = sum(variances) / len(variances)
    return Done(len(judgements), counts)


def candidates_task(work: Work) -> tuple[SamplingTask[Prompt], int]:
    """Return a task with a request per prompt, and the number of prompts that leave no room for a whole response."""
    is_anchor = work.stage.kind is ANCHORS
    writer, letter = (work.config.pairs.rejected_from, "a") if is_anchor else (model_name(work.round), "c")
    params = replace(params_of(work.config.candidates), logprobs=work.config.sampler.logprobs)
    by = SampledBy.of_run(work, writer, params)
    prompts = read_jsonl(work.read(PROMPTS.of(work.round), "prompts.jsonl"), Prompt)
    requests = [SamplingRequest(one.id, one, by.chat.prompt(one.text, one.system)) for one in prompts]
    records = partial(candidates_of, by, letter)
    return SamplingTask(writer, requests, by.params, records, "candidates.jsonl", "prompts").fitting(work.config)


def judgements_task(work: Work) -> tuple[SamplingTask[Candidate], int]:
    """Return a task with a request per candidate for all its judgements, and the number of candidates too long for one.
    Those of a prompt follow one another, as the beginning that they share is then still in the sampler's cache."""
    is_previous = work.stage.kind is PREVIOUS_JUDGEMENTS
    judge, letter = (model_name(work.round - 1), "p") if is_previous else (model_name(work.round), "j")
    by, template = SampledBy.of_run(work, judge, params_of(work.config.judge)), judge_template(work)
    requests = [
        SamplingRequest(candidate.id, candidate, by.chat.prompt(template.fill(candidate.question, candidate.text)))
        for candidate in read_candidates(work)
    ]
    records = partial(judgements_of, by, letter)
    return SamplingTask(judge, requests, by.params, records, "judgements.jsonl", "responses").fitting(work.config)


def read_candidates(work: Work) -> list[Candidate]:
    """Read the candidates that the stage judges, in the order of their prompts: the round's own, or its anchor's."""
    judged = ANCHORS if work.stage.kind is ANCHOR_JUDGEMENTS else CANDIDATES
    return list(read_jsonl(work.read(judged.of(work.round), "candidates.jsonl"), Candidate))


def params_of(settings: CandidatesConfig | JudgeConfig) -> SamplingParams:
    """Return the decoding settings of a section; each shard sets its own seed."""
    return SamplingParams(settings.n, settings.temperature, settings.top_p, settings.max_new_tokens, seed=0)


def judge_at_random(work: Work, shard: Shard[Candidate]) -> Answered:
    """Return judgements with whole scores from 0 to judge.max_score, equally likely whatever the response."""
    rng = random.Random(shard.seed)
    judgements: list[Judgement] = []
    for candidate in shard.requests:
        for number in range(work.config.judge.n):
            score = rng.randint(0, work.config.judge.max_score)
            text = f"Score: {score}"
            judgements.append(
                Judgement(f"{candidate.id}-j{number}", candidate.id, text, score, "stop", shard.seed, "random")
            )
    return Answered(judgements)
