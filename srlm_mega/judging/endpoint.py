"""Client of an OpenAI-compatible endpoint: one question, one answer, with a time limit and retries.

The key is read from an environment variable and sent in the request's header, nowhere else. It is removed from
everything that the endpoint sends back before that is logged or stored.
"""

import os
from collections.abc import Callable, Mapping
from time import sleep as wait
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.errors import CannotContinue, UserError

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
WRONG_KEY, WRONG_NAME = (401, 403), 404
TRANSIENT = (408, 409, 429)  # and 5xx: a retry may succeed
CUT = ("length", "content_filter")  # reasons to end an answer before it is whole
QUOTED = 200  # characters of a response that an error quotes


class RequestFailed(Exception):
    """This request failed; other requests may succeed."""


class TransientFailure(RequestFailed):
    """This request failed; a retry may succeed."""


class Unreachable(TransientFailure):
    """No connection to the endpoint."""


class Endpoint:
    """Chat completions of one model, decoded greedily. Safe to use from several threads."""

    def __init__(
        self,
        settings: PairwiseJudgeConfig,
        environment: Mapping[str, str] = os.environ,
        sleep: Callable[[float], None] = wait,
    ) -> None:
        assert settings.endpoint is not None, "the configuration refuses an endpoint without its URL"
        self._settings = settings
        self._url = f"{settings.endpoint.rstrip('/')}/chat/completions"
        self._key = settings.key(environment)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(headers=headers, timeout=settings.timeout_seconds)
        self._sleep = sleep

    def ask(self, question: str) -> tuple[str, bool]:
        """Return the answer, and whether `max_new_tokens` or a filter cut it off. Raise RequestFailed when all attempts
        failed, CannotContinue when the endpoint cannot be reached, UserError for a wrong key or model."""
        try:
            return self._retrying()(self._ask_once, question)
        except Unreachable as error:
            raise CannotContinue(
                f"the judge's endpoint {self._settings.endpoint} cannot be reached ({error}) in "
                f"{self._settings.attempts} attempts. What was judged so far is kept: when the endpoint is up, the "
                "same command resumes"
            ) from None

    def close(self) -> None:
        """Close the endpoint's connections."""
        self._client.close()

    def _ask_once(self, question: str) -> tuple[str, bool]:
        body = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self._settings.max_new_tokens,
        }
        try:
            response = self._client.post(self._url, json=body)
        except httpx.ConnectError as error:
            raise Unreachable(self._cleared(str(error))) from None
        except httpx.TimeoutException:
            raise TransientFailure(f"no answer within {self._settings.timeout_seconds:g} s") from None
        except httpx.TransportError as error:
            raise TransientFailure(self._cleared(f"{type(error).__name__}: {error}")) from None
        self._check_status(response)
        return self._answer_in(response)

    def _check_status(self, response: httpx.Response) -> None:
        said = f"HTTP {response.status_code}: {self._cleared(response.text)[:QUOTED]}"
        if response.status_code in WRONG_KEY:
            raise UserError(f"{self._settings.endpoint} refuses the key ({said}). {self._key_advice()}")
        if response.status_code == WRONG_NAME:
            raise UserError(
                f"{self._url} has no model {self._settings.model} ({said}): correct the judge's `endpoint` or `model`"
            )
        if response.status_code in TRANSIENT or response.status_code >= 500:
            raise TransientFailure(said)
        if response.status_code != 200:
            raise RequestFailed(said)

    def _answer_in(self, response: httpx.Response) -> tuple[str, bool]:
        try:
            choice: Any = response.json()["choices"][0]
            content, cut = choice["message"]["content"], choice.get("finish_reason") in CUT
        except (ValueError, LookupError, TypeError, AttributeError):
            content, cut = None, False
        if not isinstance(content, str):
            raise TransientFailure(f"not a chat completion: {self._cleared(response.text)[:QUOTED]}")
        return self._cleared(content), cut

    def _cleared(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def _key_advice(self) -> str:
        if self._settings.api_key_variable is None:
            return "Set the judge's `api_key_variable` to the NAME of the environment variable that holds its key"
        return f"Check the value of {self._settings.api_key_variable} in the environment"

    def _retrying(self) -> Retrying:
        return Retrying(
            stop=stop_after_attempt(self._settings.attempts),
            wait=wait_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS),
            retry=retry_if_exception_type(TransientFailure),
            sleep=self._sleep,
            reraise=True,
        )
