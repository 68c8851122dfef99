"""prompts: new instructions for a round, from a file or written few-shot (Self-Instruct), never the same twice."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from srlm_mega.chat import Chat
from srlm_mega.data.self_instruct import KnownTexts, TaskFilter, few_shot_prompt, parse_tasks
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.records import FailedRequest, Prompt, PromptDraft, RankedReplies, SftExample, read_jsonl, write_jsonl
from srlm_mega.run.stage_kinds import PROMPTS, model_name
from srlm_mega.run.work import Done, Work
from srlm_mega.sampling.retries import RetryingSampler
from srlm_mega.sampling.sampler import ModelLimits, SamplingParams
from srlm_mega.sampling.shards import write_durably
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.sampler_weights import open_model
from srlm_mega.stages.sampling_task import SampledBy

REQUESTS_PER_WAVE = 64


def write_prompts(work: Work) -> Done:
    """`per_round` prompts that no earlier round had."""
    match work.config.prompts.generator:
        case "file":
            return take_from_file(work)
        case "self_instruct":
            return self_instruct(work)


def take_from_file(work: Work) -> Done:
    """The round's slice of the given prompts, in a seeded order: rounds are disjoint, and none repeats seed data."""
    settings = work.config.prompts
    given = list(read_jsonl(work.read("seed", "prompts.jsonl"), Prompt))
    prompts = list({prompt.text: prompt for prompt in reversed(given)}.values())  # of equal texts the first
    random.Random(derive_seed(work.config.run.seed, "prompts")).shuffle(prompts)
    chat, known = answering_chat(work), KnownTexts(settings.rouge_l_max, seed_prompts(work))
    fitting = [prompt for prompt in prompts if fits(work, chat, prompt.text)]
    usable = [prompt for prompt in fitting if known.repeated_by(prompt.text) is None]
    size = settings.per_round
    mine = usable[(work.round - 1) * size : work.round * size]
    counts = {
        "repeated": len(given) - len(prompts),
        "no_room": len(prompts) - len(fitting),
        "in_seed_data": len(fitting) - len(usable),
    }
    if len(mine) < size:
        raise UserError(
            f"{settings.path} has {len(usable)} usable prompts ({counts['repeated']} repeated, {counts['no_room']} too "
            f"long to answer, {counts['in_seed_data']} like a prompt of the seed data); "
            f"round {work.round} needs prompts {(work.round - 1) * size + 1} to {work.round * size}. "
            "Give more prompts, or lower prompts.per_round or run.rounds."
        )
    write_jsonl(work.out / "prompts.jsonl", mine)
    return Done(len(mine), counts)


def self_instruct(work: Work) -> Done:
    """Waves of few-shot requests to the writer until enough of what it wrote passes the filters."""
    settings = work.config.prompts
    writer, chat = writer_model(work), answering_chat(work)
    writer_chat = Chat.from_folder(work.run.weights(writer))
    stop = writer_chat.stop(settings.stop)
    params = SamplingParams(1, settings.temperature, settings.top_p, settings.max_new_tokens, seed=0, stop=stop)
    by = SampledBy(writer_chat, work.run.digest(writer), params)
    sampler = open_model(work, writer, int(work.config.sampler.max_failed_share * settings.max_requests))
    seeds = [example.prompt for example in read_jsonl(work.read("seed", "ift.jsonl"), SftExample)]
    shots = settings.shots_ift + settings.shots_generated
    if len(seeds) < shots:
        raise UserError(f"{len(seeds)} IFT prompts are too few for requests of {shots} shots: lower prompts.shots_ift")
    earlier = [
        prompt.text
        for before in range(1, work.round)
        for prompt in read_jsonl(work.read(PROMPTS.of(before), "prompts.jsonl"), Prompt)
    ]
    known = [*seed_prompts(work), *earlier]
    task_filter = TaskFilter(settings.min_words, settings.max_words, settings.rouge_l_max, known)
    accepted: list[Prompt] = []
    no_room = 0
    for wave in count():
        if wave * REQUESTS_PER_WAVE >= settings.max_requests:
            raise CannotContinue(
                f"{wave * REQUESTS_PER_WAVE} requests (prompts.max_requests) gave {len(accepted)} of "
                f"{settings.per_round} prompts; rejected: {dict(task_filter.rejected)}, too long to answer: {no_room}. "
                f"Lower prompts.per_round, loosen the filters, or read {work.out} to see what the writer wrote."
            )
        generated = [*earlier, *(prompt.text for prompt in accepted)]
        path = work.out / f"drafts_{wave:05d}.jsonl"
        if not path.exists():  # else a killed attempt got this far
            drafts = sample_drafts(work, wave, seeds, generated, by, sampler)
            write_durably(path, partial(write_jsonl, records=drafts))
        for draft in read_jsonl(path, PromptDraft):
            for task in parse_tasks(draft.text, truncated=draft.finish_reason == "length"):
                if not fits(work, chat, task):
                    no_room += 1
                elif len(accepted) < settings.per_round and task_filter.accept(task):
                    number = len(accepted)
                    accepted.append(Prompt(f"r{work.round}-p{number:05d}", task, f"self_instruct/{draft.id}"))
        work.progress.update(len(accepted), settings.per_round, "prompts")
        if len(accepted) == settings.per_round:
            break
    sampler.close()
    write_jsonl(work.out / "prompts.jsonl", accepted)
    return Done(len(accepted), {**task_filter.rejected, "no_room": no_room, "requests": (wave + 1) * REQUESTS_PER_WAVE})


def sample_drafts(
    work: Work, wave: int, seeds: Sequence[str], generated: Sequence[str], by: SampledBy, sampler: RetryingSampler
) -> list[PromptDraft]:
    """One wave: each request shows IFT tasks and, once there are some, tasks written before."""
    settings = work.config.prompts
    seed = derive_seed(work.config.run.seed, work.stage.name, wave)
    rng = random.Random(seed)
    num_generated = settings.shots_generated if len(generated) >= settings.shots_generated else 0
    num_ift = settings.shots_ift + settings.shots_generated - num_generated
    positions = ModelLimits.of_folder(work.run.weights(writer_model(work))).max_positions  # of any model from outside
    longest = min(work.config.model.seq_length, positions) - settings.max_new_tokens
    requests: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(REQUESTS_PER_WAVE):
        shots = rng.sample(seeds, num_ift) + rng.sample(generated, num_generated)
        rng.shuffle(shots)
        request = few_shot_prompt(shots)
        ids = by.chat.document(request, end=False)
        if len(ids) <= longest:  # a request that does not fit whole is not sent
            requests.append((request, ids))
    names = [f"r{work.round}-w{wave:05d}-{number:02d}" for number in range(len(requests))]
    answers = sampler.sample(names, [ids for _, ids in requests], replace(by.params, seed=seed))
    return [
        PromptDraft(id=name, request=request, cumulative_logprob=completion.cumulative_logprob, **by.fields(completion))
        for name, (request, _), completions in zip(names, requests, answers, strict=True)
        if not isinstance(completions, FailedRequest)  # another request will do as well
        for completion in completions
    ]


def writer_model(work: Work) -> str:
    """Who writes the prompts."""
    match work.config.prompts.writer:
        case "base":
            return "M0"
        case "current":
            return model_name(work.round)
        case _:
            return "prompt_writer"


def answering_chat(work: Work) -> Chat:
    """The tokenizer that all models of the run share; the writer's may be another."""
    return Chat.from_folder(work.run.weights("M0" if "M0" in work.stage.inputs else model_name(work.round)))


def seed_prompts(work: Work) -> list[str]:
    """Every prompt of the seed data: new ones must not repeat what a model learnt from or is measured on."""
    prompts = [example.prompt for example in read_jsonl(work.read("seed", "ift.jsonl"), SftExample)]
    for name in ("validation.jsonl", "test.jsonl"):
        prompts += [prompt.text for prompt in read_jsonl(work.read("seed", name), Prompt)]
    for name in ("eft_eval.jsonl", "eft_sources.jsonl"):
        prompts += [ranked.prompt for ranked in read_jsonl(work.read("seed", name), RankedReplies)]
    return prompts


def fits(work: Work, chat: Chat, text: str) -> bool:
    """Whether a prompt leaves room for a response."""
    return len(chat.prompt(text)) <= work.config.longest_prompt(work.config.candidates.max_new_tokens)
