"""The models that a process samples: one at a time, loaded once for all the lists of requests that follow one another,
in this process or by replicas."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from srlm_mega.config import Config
from srlm_mega.records import PromptTokens, SampledTexts
from srlm_mega.run.files import discard
from srlm_mega.sampling.job_files import SampledModel
from srlm_mega.sampling.local_model import LocalModel
from srlm_mega.sampling.replicas import Replicas
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.sampling.sampling_rate import ProgressCallback, ShardWatch, unreported
from srlm_mega.sampling.shards import ShardFiles, cut_one_call


class OpenModel(Protocol):
    """A model that is loaded, or being loaded, and answers lists of requests."""

    def answer(self, files: ShardFiles[PromptTokens], params: SamplingParams, watch: ShardWatch) -> None:
        """Finish all shards of a list of requests, which is prepared. CannotContinue when too many requests failed;
        RuntimeError when no engine is left."""

    def close(self) -> None:
        """Free the model."""


class Samplers:
    """The model that is sampled now. `folder`: a folder for the replicas' files, which must be on all their nodes; it
    is made when it is needed, and removed by `close`."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self._folder = folder
        self._model: SampledModel | None = None
        self._open: OpenModel | None = None

    def answer(
        self, model: SampledModel, files: ShardFiles[PromptTokens], params: SamplingParams, watch: ShardWatch
    ) -> None:
        """Answer the unfinished shards of a list of requests with a model, after freeing any other one. UserError when
        the model or the sampler's environment cannot be used; else as `OpenModel.answer` says."""
        for earlier in files.prepare():
            watch.earlier(earlier)
        if not files.missing():
            return
        if self._model != model:
            self.close()
            self._open, self._model = self._opened(model), model
        assert self._open is not None
        self._open.answer(files, params, watch)

    def ask(
        self,
        model: SampledModel,
        requests: Sequence[PromptTokens],
        params: SamplingParams,
        file: Path,
        allowed: int = 0,
        on_progress: ProgressCallback = unreported,
    ) -> list[SampledTexts]:
        """Return the answers of a list of requests, in order, without those that failed, which may be `allowed`. Their
        draws follow from params.seed and their positions. `file` names them: their shards lie beside it while they are
        answered, and a killed stage resumes there. CannotContinue when more fail."""
        sampler = self.config.sampler
        shards = cut_one_call(requests, sampler.requests_per_call_shard, params.seed, model.name)
        files = ShardFiles(shards, file, allowed)
        watch = ShardWatch(None, on_progress, len(requests), sampler.devices_per_replica, self.config.sampler_replicas)
        self.answer(model, files, params, watch)
        files.check_failures()
        answers = list(files.read(SampledTexts))
        files.tidy()
        return answers

    def close(self) -> None:
        """Free the model."""
        if self._open is not None:
            self._open.close()
            self._open = self._model = None
        discard(self._folder)

    def _opened(self, model: SampledModel) -> OpenModel:
        if self.config.starts_replicas:
            return Replicas(self.config, model, self._folder)
        return LocalModel(self.config.sampler, model)
