"""Stage prompts: new instructions for a round, from a file or few-shot from a model (Self-Instruct), none repeated."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from srlm_mega.chat import Chat
from srlm_mega.data.self_instruct import TaskFilter, few_shot_prompt, parse_tasks
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.records import Prompt, PromptDraft, PromptTokens, SftExample, read_jsonl, write_jsonl
from srlm_mega.run.sealed_file import fingerprint, is_whole, write_sealed
from srlm_mega.run.stage_kinds import model_name
from srlm_mega.sampling.sampler import ModelLimits, SamplingParams
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.given_prompts import given_prompts, prompts_of_rounds, seed_prompts_in
from srlm_mega.stages.sampler_weights import sampled_model
from srlm_mega.stages.sampling_task import SampledBy
from srlm_mega.stages.work import Done, Work

REQUESTS_PER_WAVE = 64


def write_prompts(work: Work) -> Done:
    """Write `prompts.jsonl`: prompts.per_round prompts that no earlier round had."""
    match work.config.prompts.generator:
        case "file":
            return take_from_file(work)
        case "self_instruct":
            return self_instruct(work)


def take_from_file(work: Work) -> Done:
    """Write the next prompts of the given ones: no earlier round's, and none of the seed data. UserError when there are
    not enough."""
    config, run = work.config, work.run
    taken = prompts_of_rounds(run, range(1, work.round))
    given = given_prompts(config, run, answering_chat(work), seed_prompts(work), taken, work.out / "quarantine.jsonl")
    given.check_enough(config, len(taken), [work.round])
    ids = {prompt.id for prompt in taken}  # lines of another file may have the same numbers
    mine = given.usable[: config.prompts.per_round]
    named = [replace(one, id=f"r{work.round}-{one.id}") if one.id in ids else one for one in mine]
    write_jsonl(work.out / "prompts.jsonl", named)
    return Done(len(named), given.counts)


def self_instruct(work: Work) -> Done:
    """Send waves of few-shot requests to the writer until prompts.per_round of its tasks pass the filters.
    CannotContinue after prompts.max_requests requests; UserError when there are too few IFT prompts to show."""
    settings = work.config.prompts
    writer, chat = writer_model(work), answering_chat(work)
    writer_chat = Chat.from_folder(work.run.weights(writer))
    stop = writer_chat.stop(settings.stop)
    params = SamplingParams(1, settings.temperature, settings.top_p, settings.max_new_tokens, seed=0, stop=stop)
    by = SampledBy(writer_chat, work.run.digest(writer), params)
    allowed = int(work.config.sampler.max_failed_share * settings.max_requests)
    seeds = [example.prompt for example in read_jsonl(work.read("seed", "ift.jsonl"), SftExample)]
    shots = settings.shots_ift + settings.shots_generated
    if len(seeds) < shots:
        raise UserError(f"{len(seeds)} IFT prompts are too few for requests of {shots} shots: lower prompts.shots_ift")
    earlier = [prompt.text for prompt in prompts_of_rounds(work.run, range(1, work.round))]
    known = [*seed_prompts(work), *earlier]
    task_filter = TaskFilter(settings.min_words, settings.max_words, settings.rouge_l_max, known)
    accepted: list[Prompt] = []
    no_room = 0
    for wave in count():  # a task that passes is shown to the writer in later waves, so they come one after the other
        asked = wave * REQUESTS_PER_WAVE
        if asked >= settings.max_requests:
            raise CannotContinue(
                f"{settings.max_requests} requests (prompts.max_requests) gave {len(accepted)} of "
                f"{settings.per_round} prompts; rejected: {dict(task_filter.rejected)}, too long to answer: {no_room}. "
                f"Lower prompts.per_round, loosen the filters, or read {work.out} to see what the writer wrote. The "
                "rules of form are for English (docs/data.md): prompts of other languages come from a file "
                "(prompts.generator=file)"
            )
        drafts, failed = sample_drafts(work, wave, seeds, earlier, accepted, by, allowed)
        allowed -= failed
        for draft in drafts:
            for task in parse_tasks(draft.text, truncated=draft.finish_reason == "length"):
                if not fits(work, chat, task):
                    no_room += 1
                elif len(accepted) < settings.per_round and task_filter.accept(task):
                    number = len(accepted)
                    accepted.append(Prompt(f"r{work.round}-p{number:05d}", task, f"self_instruct/{draft.id}"))
        work.progress.update(len(accepted), settings.per_round, "prompts")
        if len(accepted) == settings.per_round:
            break
    write_jsonl(work.out / "prompts.jsonl", accepted)
    requests = min((wave + 1) * REQUESTS_PER_WAVE, settings.max_requests)
    return Done(len(accepted), {**task_filter.rejected, "no_room": no_room, "requests": requests})


def sample_drafts(
    work: Work,
    wave: int,
    seeds: Sequence[str],
    earlier: Sequence[str],
    accepted: Sequence[Prompt],
    by: SampledBy,
    allowed: int,
) -> tuple[list[PromptDraft], int]:
    """Sample one wave of requests, each of which shows IFT tasks and, once there are enough, generated ones: of earlier
    rounds, and those `accepted` so far. The last wave is as short as prompts.max_requests makes it. Return the drafts,
    of which a killed attempt may have left the file, and how many requests failed for good, which may be `allowed`."""
    settings, generated = work.config.prompts, [*earlier, *(prompt.text for prompt in accepted)]
    seed = derive_seed(work.config.run.seed, work.stage.name, wave)
    rng = random.Random(seed)
    num_generated = settings.shots_generated if len(generated) >= settings.shots_generated else 0
    num_ift = settings.shots_ift + settings.shots_generated - num_generated
    positions = ModelLimits.of_folder(
        work.run.weights(writer_model(work))
    ).max_positions  # those of a model from outside may be few
    longest = min(work.config.model.seq_length, positions) - settings.max_new_tokens
    requests: dict[str, tuple[str, tuple[int, ...]]] = {}  # by name
    for _ in range(min(REQUESTS_PER_WAVE, settings.max_requests - wave * REQUESTS_PER_WAVE)):
        shots = rng.sample(seeds, num_ift) + rng.sample(generated, num_generated)
        rng.shuffle(shots)
        request = few_shot_prompt(shots)
        ids = by.chat.running_text(request)
        if len(ids) <= longest:  # a request is never cut
            requests[f"r{work.round}-w{wave:05d}-{len(requests):02d}"] = request, ids

    def report(answered: int, total: int, note: str) -> None:
        note = f"wave {wave + 1}: {answered} of {total} requests answered"
        work.progress.update(len(accepted), settings.per_round, "prompts", note)

    asked = [PromptTokens(name, ids) for name, (_, ids) in requests.items()]
    params, made_from = replace(by.params, seed=seed), fingerprint(seed, of=asked)
    file, path = work.out / f"wave_{wave:05d}", work.out / f"drafts_{wave:05d}.jsonl"
    if not is_whole(path, made_from):
        answers = work.samplers.ask(sampled_model(work, writer_model(work)), asked, params, file, allowed, report)
        records = (
            PromptDraft(id=answer.id, request=requests[answer.id][0], **by.fields(completion))
            for answer in answers
            for completion in answer.completions
        )
        write_sealed(path, partial(write_jsonl, records=records), made_from)
    drafts = list(read_jsonl(path, PromptDraft))
    return drafts, len(asked) - len(drafts)  # the next wave makes up for them


def writer_model(work: Work) -> str:
    """Return the name of the model that writes the prompts."""
    match work.config.prompts.writer:
        case "base":
            return "M0"
        case "current":
            return model_name(work.round)
        case _:
            return "prompt_writer"


def answering_chat(work: Work) -> Chat:
    """Load the tokenizer that all models of the run share; a writer from outside may have another."""
    return Chat.from_folder(work.run.weights("M0" if "M0" in work.stage.inputs else model_name(work.round)))


def seed_prompts(work: Work) -> list[str]:
    """Read every prompt of the seed data, as `seed_prompts_in` says."""
    return seed_prompts_in(work.read("seed", ""))


def fits(work: Work, chat: Chat, text: str, system: str = "") -> bool:
    """Return True when a prompt leaves room for a whole response."""
    return len(chat.prompt(text, system)) <= work.config.longest_prompt(work.config.candidates.max_new_tokens)
