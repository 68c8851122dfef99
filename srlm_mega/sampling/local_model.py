"""A model in this process: a replica's, or the only one."""

from collections.abc import Callable
from pathlib import Path

from srlm_mega.chat import Chat, StopStrings
from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.records import PromptTokens, SampledText
from srlm_mega.sampling.backends import open_sampler
from srlm_mega.sampling.in_flight import ShardsInFlight, Taker
from srlm_mega.sampling.job_files import SampledModel, read_job
from srlm_mega.sampling.sampler import Completion, SamplingParams
from srlm_mega.sampling.sampling_rate import Watch
from srlm_mega.sampling.shards import ShardFiles


class LocalModel:
    """An `OpenModel` in this process."""

    def __init__(
        self, sampler: SamplerConfig, model: SampledModel, replica: int = 0, replicas: Callable[[], int] = lambda: 1
    ) -> None:
        """Load the model, as one of so many replicas that have loaded it. UserError or ValueError when the folder does
        not fit the backend."""
        self._chat = Chat.from_folder(model.weights)
        self._taker = Taker(replica, sampler.take_over_seconds, sampler.attempts, sampler.traits.continuous, replicas)
        self._sampler = open_sampler(sampler, model.loaded, self._chat.end_ids)

    def answer(self, files: ShardFiles[PromptTokens], params: SamplingParams, watch: Watch) -> None:
        """Finish all shards, as `OpenModel.answer` specifies, but for those that other replicas hold."""

        def as_text(completion: Completion) -> SampledText:
            return sampled_text(self._chat, params.stop, completion)

        ShardsInFlight(files, params, self._sampler, as_text, self._taker, watch).run()

    def answer_job(self, shards: Path, watch: Watch) -> None:
        """Work on the job in a folder of shards until it is done, or its folder is gone because it was."""
        try:
            files, params = read_job(shards, self._chat.stop)
            self.answer(files, params, watch)
        except FileNotFoundError:
            if shards.is_dir():
                raise

    def close(self) -> None:
        """Free the model."""
        self._sampler.close()


def sampled_text(chat: Chat, stop: StopStrings | None, completion: Completion) -> SampledText:
    """Return a completion's record, whose text ends before the stop string."""
    text = chat.decode(completion.token_ids)
    return SampledText(
        text=text if stop is None else stop.before(text),
        token_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        seed=completion.seed,
        cumulative_logprob=completion.cumulative_logprob,
    )
