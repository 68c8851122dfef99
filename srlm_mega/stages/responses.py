"""One response of a model to each of a list of prompts, for comparisons and exports."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from srlm_mega.chat import Chat
from srlm_mega.config import Config
from srlm_mega.errors import UserError
from srlm_mega.records import Prompt
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.retries import open_retrying_sampler
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.sampling.sampling_rate import ProgressCallback, ShardWatch
from srlm_mega.sampling.shards import ShardFiles, cut_into_shards, run_shards
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.sampling_task import SampledBy, SamplingRequest, answer, candidates_of, fitting_requests


@dataclass(frozen=True)
class Writer:
    """A model's Hugging Face folder, and its name in records."""

    name: str
    folder: Path


def held_out(run: RunDir) -> Path:
    """Return the file of prompts that models are compared on: the test set or, in a run without one, the validation
    prompts, by which early stopping chooses checkpoints."""
    test = run.output("seed") / "test.jsonl"
    return test if test.is_file() and test.stat().st_size else run.output("seed") / "validation.jsonl"


def respond(
    config: Config,
    writer: Writer,
    prompts: Sequence[Prompt],
    temperature: float,
    top_p: float,
    file: Path,
    on_progress: ProgressCallback,
) -> int:
    """Write a response (Candidate) per prompt to `file`, by way of shards that survive a kill. Returns the number of
    prompts left out because a whole response would not fit.

    The draws depend only on the run's seed and the prompts, so that differences between models come from the models.
    For the same reason no request may fail: CannotContinue. UserError when no prompt fits.
    """
    length = config.candidates.max_new_tokens
    chat = Chat.from_folder(writer.folder)
    asked = [SamplingRequest(prompt.id, prompt, chat.prompt(prompt.text, prompt.system)) for prompt in prompts]
    requests = fitting_requests(config, asked, length)
    if not requests:
        longest = config.longest_prompt(length)
        raise UserError(f"no prompt has {longest} tokens or fewer: lower candidates.max_new_tokens")
    params = SamplingParams(1, temperature, top_p, length, seed=0)
    records = partial(candidates_of, SampledBy(chat, writer.name, params), "c")
    shards = cut_into_shards(requests, config.sampler.shard_size, derive_seed(config.run.seed, "responses"))
    devices = config.sampler.devices_per_replica
    watch = ShardWatch(file.with_name("metrics.jsonl"), on_progress, len(requests), devices, replicas=1)
    with closing(open_retrying_sampler(config.sampler, writer.folder, chat.end_ids, allowed=0)) as sampler:
        ask = partial(answer, params, records, sampler)
        run_shards(ShardFiles(shards, file), ask, watch.earlier, watch.finished)
    watch.close()
    return len(prompts) - len(requests)
