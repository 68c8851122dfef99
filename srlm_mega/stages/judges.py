"""Pairwise judges: the one that runs here, through the sampler, and the choice of the configured one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from srlm_mega.chat import Chat
from srlm_mega.config import Config
from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.records import PairwiseJudgement
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.retries import RetryingSampler, open_retrying_sampler
from srlm_mega.sampling.sampler import Completion, ModelLimits, SamplingParams
from srlm_mega.sampling.shards import Answered, Shard
from srlm_mega.stages.pairwise_judge import PairwiseJudge, PairwiseQuestion, judgement_of
from srlm_mega.stages.sampler_weights import require_verified
from srlm_mega.stages.sampling_task import SampledBy, SamplingRequest, answer


@dataclass(frozen=True)
class LocalJudge:
    """A `PairwiseJudge` that samples a Hugging Face model, greedily. `longest`: most tokens of a question."""

    name: str
    shard_size: int
    chat: Chat
    sampler: RetryingSampler
    params: SamplingParams
    longest: int

    @classmethod
    def of_folder(
        cls,
        name: str,
        folder: Path,
        loaded: Path,
        max_new_tokens: int,
        sampler: SamplerConfig,
        allowed: int,
        seq_length: int | None = None,
    ) -> "LocalJudge":
        """Load the model of a Hugging Face folder. `loaded`: the folder that the sampler loads in its place (FP8, an
        engine); `seq_length`: the limit of an engine. UserError when its tokenizer or chat template cannot be used."""
        chat, positions = Chat.from_folder(folder), ModelLimits.of_folder(folder).max_positions
        if seq_length is not None:
            positions = min(positions, seq_length)
        ready = open_retrying_sampler(sampler, loaded, chat.end_ids, allowed)
        params = SamplingParams(1, 0.0, 1.0, max_new_tokens, seed=0)
        return cls(name, sampler.shard_size, chat, ready, params, positions - max_new_tokens)

    def fits(self, text: str) -> bool:
        """Return True when a question leaves room for a whole answer."""
        return len(self.chat.prompt(text)) <= self.longest

    def answer(self, shard: Shard[PairwiseQuestion]) -> Answered:
        """Answer a shard's questions in one call of the sampler, as `PairwiseJudge.answer` specifies."""
        requests = [
            SamplingRequest(question.prompt_id, question, self.chat.prompt(question.text))
            for question in shard.requests
        ]
        asked = Shard(shard.number, shard.first, shard.seed, requests)
        return answer(self.params, self._judgements, self.sampler, asked)

    def close(self) -> None:
        """Free the model."""
        self.sampler.close()

    def _judgements(
        self, request: SamplingRequest[PairwiseQuestion], completions: Sequence[Completion]
    ) -> Iterator[PairwiseJudgement]:
        by = SampledBy(self.chat, self.name, self.params)
        return (judgement_of(request.source, by.fields(completion)) for completion in completions)


def open_m1(run: RunDir, config: Config, loaded: Path, questions: int) -> LocalJudge:
    """Load M1 of a run as a judge that tolerates no failed question. `loaded`: as for `LocalJudge.of_folder`."""
    name, folder, length = run.digest("M1"), run.weights("M1"), config.judge.max_new_tokens
    seq_length = config.model.seq_length
    return LocalJudge.of_folder(name, folder, loaded, length, config.sampler, allowed=0, seq_length=seq_length)


def open_judge(
    settings: PairwiseJudgeConfig, sampler: SamplerConfig, allow_unverified: bool, questions: int
) -> PairwiseJudge:
    """Open the configured judge for a number of questions, of which judge.max_failed_share may fail. UserError for a
    folder that was converted and not verified, unless `allow_unverified`."""
    allowed = int(settings.max_failed_share * questions)
    if settings.endpoint is None:
        folder = Path(settings.model)
        if not allow_unverified:
            require_verified(folder)
        return LocalJudge.of_folder(settings.model, folder, folder, settings.max_new_tokens, sampler, allowed)
    from srlm_mega.stages.endpoint_judge import EndpointJudge

    return EndpointJudge(settings, allowed)
