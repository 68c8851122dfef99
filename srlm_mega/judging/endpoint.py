"""An OpenAI-compatible endpoint: one question, one answer, with a time limit and second tries.

The key comes from an environment variable and goes into the request's header, nowhere else: whatever the endpoint
sends back is cleared of it before anyone sees it.
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
PASSING = (408, 409, 429)  # and 5xx: another try may do
QUOTED = 200  # characters of an endpoint's words in an error


class RequestFailed(Exception):
    """This request has no answer; another one may have."""


class Passing(RequestFailed):
    """The same request may have an answer later."""


class Unreachable(Passing):
    """Nobody answers at all."""


class Endpoint:
    """Chat completions, decoded greedily. Safe to use from several threads."""

    def __init__(
        self,
        settings: PairwiseJudgeConfig,
        environment: Mapping[str, str] = os.environ,
        sleep: Callable[[float], None] = wait,
    ) -> None:
        assert settings.endpoint is not None, "an endpoint without its URL"
        self._settings = settings
        self._url = f"{settings.endpoint.rstrip('/')}/chat/completions"
        self._key = settings.key(environment)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(headers=headers, timeout=settings.timeout_seconds)
        self._sleep = sleep

    def ask(self, question: str) -> tuple[str, bool]:
        """The answer, and whether it was cut off by `max_new_tokens`. RequestFailed when there is none after all
        attempts; CannotContinue when nobody answers at all; UserError for a wrong key or model."""
        try:
            return self._retrying()(self._ask_once, question)
        except Unreachable as error:
            raise CannotContinue(
                f"the judge's endpoint {self._settings.endpoint} cannot be reached ({error}), in "
                f"{self._settings.attempts} attempts. What was judged so far is kept: when it is up, the same command "
                "goes on"
            ) from None

    def close(self) -> None:
        """Close its connections."""
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
            raise Passing(f"no answer within {self._settings.timeout_seconds:g} s") from None
        except httpx.TransportError as error:
            raise Passing(self._cleared(f"{type(error).__name__}: {error}")) from None
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
        if response.status_code in PASSING or response.status_code >= 500:
            raise Passing(said)
        if response.status_code != 200:
            raise RequestFailed(said)

    def _answer_in(self, response: httpx.Response) -> tuple[str, bool]:
        try:
            choice: Any = response.json()["choices"][0]
            content, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError):
            content, cut = None, False
        if not isinstance(content, str):
            raise Passing(f"not a chat completion: {self._cleared(response.text)[:QUOTED]}")
        return self._cleared(content), cut

    def _cleared(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def _key_advice(self) -> str:
        if self._settings.api_key_variable is None:
            return "Set the judge's `api_key_variable` to the NAME of the environment variable that holds its key"
        return f"Look at the value of {self._settings.api_key_variable} in the environment"

    def _retrying(self) -> Retrying:
        return Retrying(
            stop=stop_after_attempt(self._settings.attempts),
            wait=wait_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS),
            retry=retry_if_exception_type(Passing),
            sleep=self._sleep,
            reraise=True,
        )
