"""One response of a model to each of a list of prompts, for comparisons and exports."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from srlm_mega.chat import Chat
from srlm_mega.config.outside_files import folder_problem
from srlm_mega.errors import UserError
from srlm_mega.records import Prompt, PromptTokens, write_jsonl
from srlm_mega.run.outside_folder import check_undamaged, content_hash
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.sealed_file import fingerprint, is_whole, write_sealed
from srlm_mega.sampling.job_files import SampledModel
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.sampling.sampling_rate import ProgressCallback
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.sampling_task import SampledBy, SamplingRequest, candidates_of, fitting_requests


@dataclass(frozen=True)
class Writer:
    """A model's Hugging Face folder, and its name in records."""

    name: str
    folder: Path

    @classmethod
    def outside(cls, folder: Path, allow_unverified: bool = False) -> "Writer":
        """Return the model in a folder, named by its content. UserError where there is none and, unless
        `allow_unverified`, for one that was converted and not verified, or altered since."""
        if (problem := folder_problem(folder, sampled=True)) is not None:
            raise UserError(f"{problem}. Give a Hugging Face model folder: config.json, weights and tokenizer.json")
        if not allow_unverified:
            check_undamaged(folder)
        return cls(content_hash(folder), folder)

    @property
    def sampled(self) -> SampledModel:
        """The model as the sampler loads it."""
        return SampledModel(self.folder, self.folder, self.name)


def held_out(run: RunDir) -> Path:
    """Return the file of prompts that models are compared on: the test set or, in a run without one, the validation
    prompts, by which early stopping chooses checkpoints."""
    test = run.output("seed") / "test.jsonl"
    return test if test.is_file() and test.stat().st_size else run.output("seed") / "validation.jsonl"


def respond(
    samplers: Samplers,
    writer: Writer,
    prompts: Sequence[Prompt],
    temperature: float,
    top_p: float,
    file: Path,
    on_progress: ProgressCallback,
) -> int:
    """Write a response (Candidate) per prompt to `file`, by way of shards that survive a kill, unless it has them
    already. Returns the number of prompts left out because a whole response would not fit.

    The draws depend only on the run's seed and the prompts, so that differences between models come from the models.
    For the same reason no request may fail: CannotContinue. UserError when no prompt fits.
    """
    config = samplers.config
    length = config.candidates.max_new_tokens
    chat = Chat.from_folder(writer.folder)
    asked = [SamplingRequest(prompt.id, prompt, chat.prompt(prompt.text, prompt.system)) for prompt in prompts]
    requests = fitting_requests(config, asked, length)
    if not requests:
        longest = config.longest_prompt(length)
        raise UserError(f"no prompt has {longest} tokens or fewer: lower candidates.max_new_tokens")
    params = SamplingParams(1, temperature, top_p, length, derive_seed(config.run.seed, "responses"))
    by = SampledBy(chat, writer.name, params)
    sent, part = [PromptTokens(one.id, one.token_ids) for one in requests], file.with_name(f"{file.name}.part")
    made_from = fingerprint(writer.name, asdict(params), of=sent)
    if not is_whole(file, made_from):
        answers = samplers.ask(writer.sampled, sent, params, part, on_progress=on_progress)
        pairs = zip(requests, answers, strict=True)
        records = (one for request, answer in pairs for one in candidates_of(by, "c", request, answer.completions))
        write_sealed(file, partial(write_jsonl, records=records), made_from)
    return len(prompts) - len(requests)
