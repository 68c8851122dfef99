"""candidates, judgements, pairs: the model answers new prompts, judges its own answers, and the best meet the worst."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from srlm_mega.chat import Chat
from srlm_mega.errors import RunStopped
from srlm_mega.judging.pairs import PairCounts, build_pairs
from srlm_mega.judging.scores import MAX_SCORE, parse_score
from srlm_mega.judging.template import JudgeTemplate
from srlm_mega.records import Candidate, Judgement, Prompt, read_jsonl, write_jsonl
from srlm_mega.sampling.sampler import SamplingParams, open_sampler
from srlm_mega.sampling.shards import Shard, cut_into_shards, run_shards
from srlm_mega.seeds import derive_seed
from srlm_mega.work import Done, Work

R = TypeVar("R")


def sample_candidates(work: Work) -> Done:
    """N responses to each prompt, by the round's model."""
    settings, model = work.config.candidates, f"M{work.round}"
    chat = Chat.from_folder(work.run.weights(model))
    prompts = list(read_jsonl(work.read(f"round_{work.round}/prompts", "prompts.jsonl"), Prompt))
    model_hash = work.run.digest(model)
    sampler = open_sampler(work.config.sampler, work.run.weights(model), chat.eos_id)

    def answer(shard: Shard[Prompt]) -> Iterator[Candidate]:
        params = SamplingParams(settings.n, settings.temperature, settings.top_p, settings.max_new_tokens, shard.seed)
        ids = [chat.prompt(prompt.text) for prompt in shard.requests]
        for prompt, prompt_ids, completions in zip(shard.requests, ids, sampler.sample(ids, params), strict=True):
            for number, completion in enumerate(completions):
                yield Candidate(
                    id=f"{prompt.id}-c{number}",
                    prompt_id=prompt.id,
                    prompt=prompt.text,
                    text=chat.decode(completion.token_ids),
                    finish_reason=completion.finish_reason,
                    seed=completion.seed,
                    model_hash=model_hash,
                    prompt_token_ids=prompt_ids,
                    token_ids=completion.token_ids,
                )

    in_shards(work, prompts, answer, "candidates.jsonl", "prompts")
    sampler.close()
    candidates = list(read_jsonl(work.out / "candidates.jsonl", Candidate))
    truncated = sum(candidate.finish_reason == "length" for candidate in candidates)
    return Done(len(candidates), {"truncated": truncated})


def judge_candidates(work: Work) -> Done:
    """k judgements of each candidate: by the round's model, or (the control) by chance."""
    candidates = list(read_jsonl(work.read(f"round_{work.round}/candidates", "candidates.jsonl"), Candidate))
    match work.config.judge.backend:
        case "model":
            too_long = judge_with_model(work, candidates)
        case "random":
            in_shards(work, candidates, lambda shard: judge_at_random(work, shard), "judgements.jsonl", "responses")
            too_long = 0
    judgements = list(read_jsonl(work.out / "judgements.jsonl", Judgement))
    unparsed = sum(judgement.score is None for judgement in judgements)
    truncated = sum(judgement.finish_reason == "length" for judgement in judgements)
    return Done(len(judgements), {"unparsed": unparsed, "truncated": truncated, "too_long": too_long})


def judge_with_model(work: Work, candidates: Sequence[Candidate]) -> int:
    """Write the judgements; returns how many candidates were left out, too long to be judged whole."""
    settings, model = work.config.judge, f"M{work.round}"
    chat = Chat.from_folder(work.run.weights(model))
    template = JudgeTemplate.from_text(work.read("seed", "judge_template.txt").read_text(encoding="utf-8"), "seed")
    longest = work.config.model.seq_length - settings.max_new_tokens
    requests = [(one, chat.prompt(template.fill(one.prompt, one.text))) for one in candidates]
    fitting = [request for request in requests if len(request[1]) <= longest]
    model_hash = work.run.digest(model)
    sampler = open_sampler(work.config.sampler, work.run.weights(model), chat.eos_id)

    def judge(shard: Shard[tuple[Candidate, tuple[int, ...]]]) -> Iterator[Judgement]:
        params = SamplingParams(settings.n, settings.temperature, settings.top_p, settings.max_new_tokens, shard.seed)
        answers = sampler.sample([ids for _, ids in shard.requests], params)
        for (candidate, _), completions in zip(shard.requests, answers, strict=True):
            for number, completion in enumerate(completions):
                text = chat.decode(completion.token_ids)
                yield Judgement(
                    id=f"{candidate.id}-j{number}",
                    candidate_id=candidate.id,
                    text=text,
                    score=parse_score(text),
                    finish_reason=completion.finish_reason,
                    seed=completion.seed,
                    model_hash=model_hash,
                )

    in_shards(work, fitting, judge, "judgements.jsonl", "responses")
    sampler.close()
    return len(requests) - len(fitting)


def judge_at_random(work: Work, shard: Shard[Candidate]) -> Iterator[Judgement]:
    """Whole scores from 0 to 5, all equally likely, whatever the response."""
    rng = random.Random(shard.seed)
    for candidate in shard.requests:
        for number in range(work.config.judge.n):
            score = rng.randint(0, int(MAX_SCORE))
            text = f"Score: {score}"
            yield Judgement(f"{candidate.id}-j{number}", candidate.id, text, score, "stop", shard.seed, "random")


def select_pairs(work: Work) -> Done:
    """Best against worst of each prompt; with too few pairs the run stops and says why."""
    folder = f"round_{work.round}"
    selection = build_pairs(
        list(read_jsonl(work.read(f"{folder}/candidates", "candidates.jsonl"), Candidate)),
        list(read_jsonl(work.read(f"{folder}/judgements", "judgements.jsonl"), Judgement)),
        min_gap=work.config.pairs.min_gap,
        min_valid=work.config.judge.min_valid,
        seed=derive_seed(work.config.run.seed, work.stage.name),
    )
    if selection.counts.pairs < work.config.pairs.min_pairs:
        raise RunStopped(too_few_pairs(work, selection.counts))
    write_jsonl(work.out / "pairs.jsonl", selection.pairs)
    return Done(len(selection.pairs), asdict(selection.counts))


def too_few_pairs(work: Work, counts: PairCounts) -> str:
    """Why there is nothing to train on, in figures, and what to do."""
    judge = f"M{work.round}" if work.config.judge.backend == "model" else "the random judge"
    folder = work.run.output(f"round_{work.round}/judgements")
    return (
        f"{counts.pairs} preference pairs from {counts.prompts} prompts, needed {work.config.pairs.min_pairs} "
        f"(pairs.min_pairs).\n"
        f"  judge {judge}: {counts.unparsed} of {counts.judgements} judgements have no `Score: x` that can be read\n"
        f"  candidates: {counts.scored} of {counts.candidates} scored, {counts.truncated} truncated, "
        f"{counts.unscored} without a score\n"
        f"  prompts: {counts.tied} tied, {counts.small_gap} with too small a gap, {counts.identical} with identical "
        f"responses, {counts.too_few} with fewer than two scored responses\n"
        f"No score is invented. Read {folder / 'judgements.jsonl'}; train {judge} on (more) judging data, or raise "
        f"candidates.max_new_tokens where responses are cut. Everything so far is kept."
    )


def in_shards(work: Work, requests: Sequence[R], do: Callable[[Shard[R]], Iterator[Any]], file: str, unit: str) -> None:
    """`do` over the requests in shards, with progress."""
    seed = derive_seed(work.config.run.seed, work.stage.name)
    shards = cut_into_shards(requests, work.config.sampler.shard_size, seed)
    run_shards(shards, do, work.out / file, lambda done, total: work.progress.update(done, total, unit))
