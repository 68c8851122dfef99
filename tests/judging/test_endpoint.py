"""The client of an OpenAI-compatible endpoint: what passes is tried again, what does not is named, the key stays where
it is."""

import logging
import socket

import pytest
from fake_endpoint import Asked, Reply, completion, fake_endpoint
from places import TOY

from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.config.file import load_config
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.judging.endpoint import Endpoint, RequestFailed

KEY = "sk-a-very-secret-key-0123456789"


def settings(url: str, **changes: object) -> PairwiseJudgeConfig:
    """A judge with short patience."""
    fields = {"model": "a-judge", "endpoint": url, "api_key_variable": "JUDGE_KEY", "attempts": 3} | changes
    return PairwiseJudgeConfig.model_validate(fields)


def ready(url: str, waits: list[float] | None = None, **changes: object) -> Endpoint:
    """A client that notes its waits and does not wait."""
    return Endpoint(settings(url, **changes), {"JUDGE_KEY": f"{KEY}\n"}, [].append if waits is None else waits.append)


def test_a_question_and_its_answer() -> None:
    with fake_endpoint(lambda asked: completion("Verdict: A")) as fake:
        assert ready(f"{fake.url}/").ask("which one?") == ("Verdict: A", False)
    (asked,) = fake.asked
    assert asked.body == {
        "model": "a-judge",
        "messages": [{"role": "user", "content": "which one?"}],
        "temperature": 0,
        "max_tokens": 512,
    }
    assert asked.headers["Authorization"] == f"Bearer {KEY}"


def test_a_cut_answer_says_so() -> None:
    with fake_endpoint(lambda asked: completion("because", "length")) as fake:
        assert ready(fake.url).ask("which one?") == ("because", True)


def test_without_a_variable_no_key_is_sent() -> None:
    with fake_endpoint(lambda asked: completion("x")) as fake:
        ready(fake.url, api_key_variable=None).ask("which one?")
    assert "Authorization" not in fake.asked[0].headers


@pytest.mark.parametrize("passing", [Reply(429), Reply(500), Reply(200, b"<html>"), Reply(200, b'{"choices": []}')])
def test_what_passes_is_tried_again_with_growing_waits(passing: Reply) -> None:
    replies, waits = iter([passing, passing, completion("Verdict: B")]), list[float]()
    with fake_endpoint(lambda asked: next(replies)) as fake:
        assert ready(fake.url, waits).ask("which one?") == ("Verdict: B", False)
    assert len(fake.asked) == 3 and waits == [1, 2]


@pytest.mark.parametrize(
    ("reply", "said", "requests"),
    [
        (Reply(200, b"<html>busy</html>"), "not a chat completion: <html>busy", 3),
        (Reply(200, b'{"choices": [{"message": {"content": null}}]}'), "not a chat completion", 3),
        (Reply(200, b"[1]"), "not a chat completion", 3),
        (Reply(503, b"busy"), "HTTP 503: busy", 3),
        (Reply(400, b"too long"), "HTTP 400: too long", 1),
    ],
)
def test_a_request_that_fails_for_good_is_named(reply: Reply, said: str, requests: int) -> None:
    with fake_endpoint(lambda asked: reply) as fake, pytest.raises(RequestFailed, match=said):
        ready(fake.url).ask("which one?")
    assert len(fake.asked) == requests


@pytest.mark.timing
def test_an_endpoint_that_hangs_fails_after_its_time() -> None:
    hangs = fake_endpoint(lambda asked: Reply(hang=True))
    with hangs as fake, pytest.raises(RequestFailed, match=r"no whole answer within 0\.2 s"):
        ready(fake.url, timeout_seconds=0.2, attempts=2).ask("which one?")
    assert len(fake.asked) == 2


def test_an_endpoint_that_is_down_stops_with_one_message() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with pytest.raises(CannotContinue, match=r"cannot be reached .* in 3 attempts.*same command resumes"):
            ready(url).ask("which one?")


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "JUDGE_KEY"), (403, "JUDGE_KEY"), (404, "no model a-judge .* `endpoint` or `model`")],
)
def test_a_wrong_key_or_model_is_the_users_and_is_not_tried_again(status: int, said: str) -> None:
    with fake_endpoint(lambda asked: Reply(status, b"no")) as fake, pytest.raises(UserError, match=said):
        ready(fake.url).ask("which one?")
    assert len(fake.asked) == 1


def test_a_refused_request_without_a_key_names_the_field() -> None:
    unsaid = fake_endpoint(lambda asked: Reply(401))
    with unsaid as fake, pytest.raises(UserError, match="Set the judge's `api_key_variable` to the NAME"):
        ready(fake.url, api_key_variable=None).ask("which one?")


def test_a_variable_that_is_not_set_is_named() -> None:
    for environment in ({}, {"JUDGE_KEY": " "}):
        with pytest.raises(UserError, match="the judge's `api_key_variable` names JUDGE_KEY, which is not set"):
            Endpoint(settings("http://127.0.0.1:9/v1"), environment)


def test_the_key_is_never_shown(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """The endpoint sends back all it was sent: in an answer, in an error of each kind."""

    def echo(status: int, asked: Asked) -> Reply:
        said = asked.headers["Authorization"]
        return completion(f"{said} Verdict: A") if status == 200 else Reply(status, said.encode())

    shown = []
    with caplog.at_level(logging.DEBUG):
        for status in (200, 400, 401, 404, 500):
            with fake_endpoint(lambda asked, status=status: echo(status, asked)) as fake:
                try:
                    shown.append(ready(fake.url).ask("which one?")[0])
                except (RequestFailed, UserError) as error:
                    shown.append(repr(error))
    everything = "".join([*shown, caplog.text, *capfd.readouterr(), repr(settings(fake.url))])
    assert KEY in fake.asked[0].headers["Authorization"], "it was sent"
    assert "[key]" in everything and KEY not in everything


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("api_key_variable", "sk-a-key", "NAME of an environment variable"),
        ("endpoint", "https://name:secret@host/v1", "carries credentials"),
        ("endpoint", "https://host/v1?key=secret", "carries credentials"),
        ("endpoint", "host:8000", "base URL"),
    ],
)
def test_a_key_in_the_configuration_is_refused_without_repeating_it(field: str, value: str, said: str) -> None:
    judge = [f"early_stopping.judge.{key}" for key in ("model=m", "endpoint=http://host/v1", f"{field}={value}")]
    with pytest.raises(UserError, match=said) as refused:
        load_config(TOY, judge)
    assert "secret" not in str(refused.value) and "sk-a-key" not in str(refused.value)
