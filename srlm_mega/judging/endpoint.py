"""Client of an OpenAI-compatible endpoint: one question, one answer, with limits of time and size, and retries.

The key is read from an environment variable and sent in the request's header, nowhere else: redirects are not followed.
It is removed from everything that the endpoint sends back before that is logged or stored.
"""

import asyncio
import os
from collections.abc import Callable, Mapping
from threading import Thread
from time import sleep as wait
from typing import Any

import httpx
import orjson
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.errors import CannotContinue, UserError

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
WRONG_KEY, WRONG_NAME = (401, 403), 404
TRANSIENT = (408, 409, 429)  # and 5xx: a retry may succeed
CUT = ("length", "content_filter")  # reasons to end an answer before it is whole
QUOTED = 200  # characters of a response that an error quotes
MAX_ANSWER_BYTES = 8 * 1024**2  # an answer has a few kilobytes


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
        headers = {"Accept-Encoding": "identity"}  # what is packed has no size before it is unpacked
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.AsyncClient(headers=headers, timeout=None)
        # Only there a limit holds for a whole answer: a reader that waits for bytes has one for the next of them.
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, daemon=True).start()
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
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _ask_once(self, question: str) -> tuple[str, bool]:
        body = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self._settings.max_new_tokens,
        }
        try:
            status, content = asyncio.run_coroutine_threadsafe(self._post(body), self._loop).result()
        except httpx.ConnectError as error:
            raise Unreachable(self._cleared(str(error))) from None
        except TimeoutError:
            raise TransientFailure(f"no whole answer within {self._settings.timeout_seconds:g} s") from None
        except httpx.TransportError as error:
            raise TransientFailure(self._cleared(f"{type(error).__name__}: {error}")) from None
        except httpx.InvalidURL as error:
            raise UserError(f"the judge's `endpoint` is no URL ({error}): correct it") from None
        self._check_status(status, content)
        return self._answer_in(content)

    async def _post(self, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Return an answer's status and content. TimeoutError when it is not there in time, RequestFailed when it is
        too large."""
        content = bytearray()
        async with (
            asyncio.timeout(self._settings.timeout_seconds),
            self._client.stream("POST", self._url, json=body) as response,
        ):
            async for part in response.aiter_raw():
                content += part
                if len(content) > MAX_ANSWER_BYTES:
                    raise RequestFailed(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
        return response.status_code, bytes(content)

    def _check_status(self, status: int, content: bytes) -> None:
        said = f"HTTP {status}: {self._quoted(content)}"
        if status in WRONG_KEY:
            raise UserError(f"{self._settings.endpoint} refuses the key ({said}). {self._key_advice()}")
        if status == WRONG_NAME:
            raise UserError(
                f"{self._url} has no model {self._settings.model} ({said}): correct the judge's `endpoint` or `model`"
            )
        if status in TRANSIENT or status >= 500:
            raise TransientFailure(said)
        if status != 200:
            raise RequestFailed(said)

    def _answer_in(self, content: bytes) -> tuple[str, bool]:
        try:
            choice: Any = orjson.loads(content)["choices"][0]  # it takes no lone surrogates and no deep nesting
            text, cut = choice["message"]["content"], choice.get("finish_reason") in CUT
        except (ValueError, LookupError, TypeError, AttributeError):
            text, cut = None, False
        if not isinstance(text, str):
            raise TransientFailure(f"not a chat completion: {self._quoted(content)}")
        return self._cleared(text), cut

    def _quoted(self, content: bytes) -> str:
        return self._cleared(content.decode(errors="replace"))[:QUOTED]

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
