"""The pairwise judge behind an OpenAI-compatible endpoint: several questions at once, failures counted."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.errors import CannotContinue
from srlm_mega.judging.endpoint import Endpoint, RequestFailed
from srlm_mega.records import Decoding, FailedRequest, PairwiseJudgement
from srlm_mega.sampling.sampling_rate import ProgressCallback, ShardWatch
from srlm_mega.sampling.shards import Answered, Shard, ShardFiles, cut_into_shards, run_shards
from srlm_mega.stages.pairwise_judge import PairwiseQuestion, judgement_of
from srlm_mega.stages.sampling_task import CompletionFields

SHARD_SIZE = 16  # at most so many answers are paid for again after a kill; fixed, as shards must be the same next time


class EndpointJudge:
    """A `PairwiseJudge` that asks an endpoint. It tolerates `allowed` questions that fail for good."""

    def __init__(self, settings: PairwiseJudgeConfig, allowed: int) -> None:
        """Open the connection. UserError when the environment variable with the endpoint's key is not set."""
        self.name = settings.model
        self._settings, self._endpoint, self._allowed = settings, Endpoint(settings), allowed
        self._failed = 0

    def fits(self, text: str) -> bool:
        """Return True: only the endpoint knows its limit, and a question that it refuses is a failed request."""
        return True

    def judge(self, questions: Sequence[PairwiseQuestion], file: Path, on_progress: ProgressCallback) -> None:
        """Ask all questions as `PairwiseJudge.judge` specifies."""
        watch = ShardWatch(file.with_name("metrics.jsonl"), on_progress, len(questions), devices=1, replicas=1)
        files = ShardFiles(cut_into_shards(questions, SHARD_SIZE, 0, self.name), file)
        run_shards(files, self._answer, watch.earlier, watch.finished)
        watch.close()

    def _answer(self, shard: Shard[PairwiseQuestion]) -> Answered:
        """Answer a shard's questions, several at once."""
        with ThreadPoolExecutor(self._settings.concurrent_requests) as threads:
            answers = list(threads.map(self._ask, shard.requests))
        failed = [answer for answer in answers if isinstance(answer, FailedRequest)]
        self._failed += len(failed)
        if self._failed > self._allowed:
            raise CannotContinue(
                f"{self._failed} questions to the judge {self.name} at {self._settings.endpoint} failed for good, "
                f"its `max_failed_share` allows {self._allowed}. The last is about {failed[-1].id}: "
                f"{failed[-1].error}. What was judged before is kept; once the cause is gone, the same command resumes"
            )
        return Answered([answer for answer in answers if isinstance(answer, PairwiseJudgement)], failed)

    def close(self) -> None:
        """Close the endpoint's connections."""
        self._endpoint.close()

    def _ask(self, question: PairwiseQuestion) -> PairwiseJudgement | FailedRequest:
        try:
            text, cut = self._endpoint.ask(question.text)
        except RequestFailed as error:
            return FailedRequest(question.prompt_id, str(error), self._settings.attempts)
        fields: CompletionFields = {
            "text": text,
            "finish_reason": "length" if cut else "stop",
            "seed": 0,
            "model_hash": self.name,
            "token_ids": (),
            "decoding": Decoding(0.0, 1.0, self._settings.max_new_tokens),
        }
        return judgement_of(question, fields)
