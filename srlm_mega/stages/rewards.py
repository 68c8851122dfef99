"""candidates, judgements: the model answers new prompts and judges its own answers.

Where the configuration asks for it, an anchor model answers them too, and the previous model judges them too.
"""

import random
from functools import partial
from typing import TypeVar, assert_never

from srlm_mega.chat import Chat
from srlm_mega.config.data import CandidatesConfig, JudgeConfig
from srlm_mega.config.file import load_config
from srlm_mega.judging.scores import MAX_SCORE, score_variance
from srlm_mega.judging.template import JudgeTemplate
from srlm_mega.plan import ANCHOR_JUDGEMENTS, ANCHORS, PREVIOUS_JUDGEMENTS, find_stage
from srlm_mega.progress import Progress
from srlm_mega.records import Candidate, Judgement, Prompt, read_jsonl
from srlm_mega.run_dir import RunDir
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.sampling.shards import Answered, Shard, run_shards
from srlm_mega.stages.eft import eft_task
from srlm_mega.stages.meta import comparisons_task
from srlm_mega.stages.sampling_task import (
    SampledBy,
    SamplingRequest,
    SamplingTask,
    candidates_of,
    judgements_of,
    that_fit,
)
from srlm_mega.stages.sharded import sample_in_shards, shard_files, work_as_replica
from srlm_mega.work import Done, Work

T = TypeVar("T")


def sample_candidates(work: Work) -> Done:
    """N responses to each prompt, by the round's model or its anchor."""
    task, too_long = candidates_task(work)
    sample_in_shards(work, task)
    candidates = list(read_jsonl(work.out / task.file, Candidate))
    truncated = sum(candidate.finish_reason == "length" for candidate in candidates)
    failed = len(task.requests) - len({candidate.prompt_id for candidate in candidates})
    return Done(len(candidates), {"truncated": truncated, "too_long": too_long, "failed": failed})


def judge_candidates(work: Work) -> Done:
    """k judgements of each candidate: by the round's model, the previous one, or (the control) by chance."""
    match work.config.judge.backend:
        case "model":
            task, too_long = judgements_task(work)
            sample_in_shards(work, task)
            requested = len(task.requests)
        case "random":
            candidates, too_long = read_candidates(work), 0
            files = shard_files(work, candidates, "judgements.jsonl")
            run_shards(files, partial(judge_at_random, work), lambda _: None, lambda _: None)
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


def replica(run: RunDir, stage_name: str, number: int) -> int:
    """One of several processes on a stage's shards; returns the exit code."""
    config = load_config(run.config_file)
    progress = Progress(run.progress_file(f"{stage_name}.replica_{number}"))
    work = Work(run, config, find_stage(config, stage_name), run.partial(stage_name), progress)
    match stage_name.rpartition("/")[2]:
        case "eft":
            return work_as_replica(work, eft_task(work)[0], number)
        case "candidates" | "anchors":
            return work_as_replica(work, candidates_task(work)[0], number)
        case "meta_judgements":
            return work_as_replica(work, comparisons_task(work)[0], number)
        case _:
            return work_as_replica(work, judgements_task(work)[0], number)


def candidates_task(work: Work) -> tuple[SamplingTask[Prompt], int]:
    """A request per prompt; and how many prompts were left out, too long for a whole response."""
    is_anchor = work.stage.name.endswith(f"/{ANCHORS}")
    model, letter = (work.config.pairs.rejected_from, "a") if is_anchor else (f"M{work.round}", "c")
    settings = work.config.candidates
    chat = Chat.from_folder(work.run.weights(model))
    model_hash = work.run.digest(model)
    prompts = read_jsonl(work.read(f"round_{work.round}/prompts", "prompts.jsonl"), Prompt)
    requests = [SamplingRequest(prompt.id, prompt, chat.prompt(prompt.text)) for prompt in prompts]
    params = params_of(settings)
    records = partial(candidates_of, SampledBy(chat, model_hash, params), letter)
    fitting = that_fit(work.config, requests, settings.max_new_tokens)
    return SamplingTask(model, fitting, params, records, "candidates.jsonl", "prompts"), len(requests) - len(fitting)


def judgements_task(work: Work) -> tuple[SamplingTask[Candidate], int]:
    """A request per candidate for all its judgements; and how many candidates were left out, too long to be judged
    whole. The order is the candidates': those of a prompt follow one another, so that the beginning they share, the
    rubric and the prompt, is still in a sampler's cache."""
    settings, is_previous = work.config.judge, work.stage.name.endswith(f"/{PREVIOUS_JUDGEMENTS}")
    model, letter = (f"M{work.round - 1}", "p") if is_previous else (f"M{work.round}", "j")
    chat = Chat.from_folder(work.run.weights(model))
    model_hash = work.run.digest(model)
    template = JudgeTemplate.from_text(work.read("seed", "judge_template.txt").read_text(encoding="utf-8"), "seed")
    requests = [
        SamplingRequest(candidate.id, candidate, chat.prompt(template.fill(candidate.prompt, candidate.text)))
        for candidate in read_candidates(work)
    ]
    params = params_of(settings)
    records = partial(judgements_of, SampledBy(chat, model_hash, params), letter)
    fitting = that_fit(work.config, requests, settings.max_new_tokens)
    return SamplingTask(model, fitting, params, records, "judgements.jsonl", "responses"), len(requests) - len(fitting)


def read_candidates(work: Work) -> list[Candidate]:
    """What this stage judges, in the order of their prompts: the round's candidates, or its anchor's."""
    name = ANCHORS if work.stage.name.endswith(f"/{ANCHOR_JUDGEMENTS}") else "candidates"
    return list(read_jsonl(work.read(f"round_{work.round}/{name}", "candidates.jsonl"), Candidate))


def params_of(settings: CandidatesConfig | JudgeConfig) -> SamplingParams:
    """How to decode; the seed is each shard's own."""
    return SamplingParams(settings.n, settings.temperature, settings.top_p, settings.max_new_tokens, seed=0)


def judge_at_random(work: Work, shard: Shard[Candidate]) -> Answered:
    """Whole scores from 0 to 5, all equally likely, whatever the response."""
    rng = random.Random(shard.seed)
    judgements: list[Judgement] = []
    for candidate in shard.requests:
        for number in range(work.config.judge.n):
            score = rng.randint(0, int(MAX_SCORE))
            text = f"Score: {score}"
            judgements.append(
                Judgement(f"{candidate.id}-j{number}", candidate.id, text, score, "stop", shard.seed, "random")
            )
    return Answered(judgements)
