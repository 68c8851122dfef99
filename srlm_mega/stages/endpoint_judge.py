"""The pairwise judge behind an OpenAI-compatible endpoint: several questions at once, failures counted."""

from concurrent.futures import ThreadPoolExecutor

from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.errors import CannotContinue
from srlm_mega.judging.endpoint import Endpoint, RequestFailed
from srlm_mega.records import Decoding, FailedRequest, PairwiseJudgement
from srlm_mega.sampling.shards import Answered, Shard
from srlm_mega.stages.pairwise_judge import PairwiseQuestion, judgement_of
from srlm_mega.stages.sampling_task import CompletionFields

SHARD_SIZE = 16  # at most so many answers are paid for again after a kill; fixed, as shards must be the same next time


class EndpointJudge:
    """A `PairwiseJudge` that asks an endpoint. It tolerates `allowed` questions that fail for good."""

    def __init__(self, settings: PairwiseJudgeConfig, allowed: int) -> None:
        """Open the connection. UserError when the environment variable with the endpoint's key is not set."""
        self.name, self.shard_size = settings.model, SHARD_SIZE
        self._settings, self._endpoint, self._allowed = settings, Endpoint(settings), allowed
        self._failed = 0

    def fits(self, text: str) -> bool:
        """Return True: only the endpoint knows its limit, and a question that it refuses is a failed request."""
        return True

    def answer(self, shard: Shard[PairwiseQuestion]) -> Answered:
        """Answer a shard's questions, several at once, as `PairwiseJudge.answer` specifies."""
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
