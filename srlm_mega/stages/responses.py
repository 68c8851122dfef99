"""What a model answers to a list of prompts, once per prompt: for comparisons and exports."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from srlm_mega.chat import Chat
from srlm_mega.config import Config
from srlm_mega.errors import UserError
from srlm_mega.records import Candidate, Prompt
from srlm_mega.run_dir import RunDir
from srlm_mega.sampling.retries import PatientSampler, none_failed, open_patient_sampler
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.sampling.shards import Answered, Shard, ShardFiles, cut_into_shards, run_shards
from srlm_mega.sampling.throughput import ShardWatch
from srlm_mega.seeds import derive_seed

Say = Callable[[int, int, str], None]
"""Requests (or questions) that are answered, of how many, and a few words."""


@dataclass(frozen=True)
class Writer:
    """A model's Hugging Face folder, and what the records call it."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Turn:
    """A prompt as token ids."""

    prompt: Prompt
    token_ids: tuple[int, ...]


def held_out(run: RunDir) -> Path:
    """The prompts that models are compared on: the test set, or, in a run without one, the validation prompts. Early
    stopping chooses checkpoints by the validation prompts."""
    test = run.output("seed") / "test.jsonl"
    return test if test.is_file() and test.stat().st_size else run.output("seed") / "validation.jsonl"


def respond(
    config: Config, writer: Writer, prompts: Sequence[Prompt], temperature: float, top_p: float, file: Path, say: Say
) -> int:
    """Write a response (Candidate) per prompt to `file`, by way of shards that survive a kill; returns how many prompts
    were left out, too long for a whole response. Greedy at temperature 0. All must be answered: models are compared on
    the same prompts.

    The draws depend on the run's seed and the prompts only: what differs between models is then the model.
    """
    length = config.candidates.max_new_tokens
    longest = config.longest_prompt(length)
    chat = Chat.from_folder(writer.folder)
    turns = [Turn(prompt, ids) for prompt in prompts if len(ids := chat.prompt(prompt.text)) <= longest]
    if not turns:
        raise UserError(f"no prompt has {longest} tokens or fewer: lower candidates.max_new_tokens")
    shards = cut_into_shards(turns, config.sampler.shard_size, derive_seed(config.run.seed, "responses"))
    devices = config.sampler.devices_per_replica
    watch = ShardWatch(file.with_name("metrics.jsonl"), say, len(turns), devices, replicas=1)
    with closing(open_patient_sampler(config.sampler, writer.folder, chat.eos_id, allowed=0)) as sampler:

        def answer(shard: Shard[Turn]) -> Answered:
            return answered(shard, writer, chat, sampler, SamplingParams(1, temperature, top_p, length, shard.seed))

        run_shards(ShardFiles(shards, file), answer, watch.earlier, watch.finished)
    watch.close()
    return len(prompts) - len(turns)


def answered(
    shard: Shard[Turn], writer: Writer, chat: Chat, sampler: PatientSampler, params: SamplingParams
) -> Answered:
    """The responses of one shard."""
    names, ids = [turn.prompt.id for turn in shard.requests], [turn.token_ids for turn in shard.requests]
    candidates = [
        Candidate(
            id=f"{turn.prompt.id}-c0",
            prompt_id=turn.prompt.id,
            prompt=turn.prompt.text,
            text=chat.decode(completion.token_ids),
            finish_reason=completion.finish_reason,
            seed=completion.seed,
            model_hash=writer.name,
            prompt_token_ids=turn.token_ids,
            token_ids=completion.token_ids,
            cumulative_logprob=completion.cumulative_logprob,
            decoding=params.decoding,
        )
        for turn, (completion,) in zip(shard.requests, none_failed(sampler.sample(names, ids, params)), strict=True)
    ]
    return Answered(candidates, (), sum(map(len, ids)), sum(len(one.token_ids) for one in candidates))
