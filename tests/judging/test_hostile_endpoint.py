"""An endpoint that means harm: its answers are failed requests, counted as such, and take neither time nor memory."""

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fake_endpoint import Reply, completion, fake_endpoint
from places import TOY

from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.config.file import check_endpoints, load_config
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.judging.endpoint import MAX_ANSWER_BYTES, Endpoint, RequestFailed
from srlm_mega.records import PairwiseJudgement, read_jsonl
from srlm_mega.stages.endpoint_judge import EndpointJudge
from srlm_mega.stages.pairwise_judge import PairwiseQuestion

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNK = b"10000\r\n" + b" " * 0x10000 + b"\r\n"


@dataclass
class RawEndpoint:
    """A server of bytes: where it listens, what it was sent, how much it sent, and when the test is over."""

    url: str = ""
    requests: list[bytes] = field(default_factory=list)
    sent: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def endless(self, start: bytes, part: bytes, pause: float = 0) -> Iterator[bytes]:
        """A beginning, then the same for ever."""
        yield start
        while not self.over.wait(pause):
            yield part


@contextmanager
def raw_endpoint(answer: Callable[[RawEndpoint], Iterator[bytes]]) -> Iterator[RawEndpoint]:
    """Answer each connection with these bytes until the block ends."""
    raw = RawEndpoint()

    def serve(connection: socket.socket) -> None:
        with connection:
            raw.requests.append(connection.recv(1 << 16))
            try:
                for part in answer(raw):
                    connection.sendall(part)
                    raw.sent += len(part)
            except OSError:  # the client has enough
                return

    def accept(listener: socket.socket) -> None:
        while not raw.over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        raw.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        try:
            yield raw
        finally:
            raw.over.set()
            listener.shutdown(socket.SHUT_RDWR)


def ask(url: str, timeout: float = 60) -> tuple[str, bool]:
    """One question, tried once."""
    fields = {"model": "a-judge", "endpoint": url, "api_key_variable": "KEY", "attempts": 1, "timeout_seconds": timeout}
    endpoint = Endpoint(PairwiseJudgeConfig.model_validate(fields), {"KEY": "sk-hush"}, lambda seconds: None)
    try:
        return endpoint.ask("which one?")
    finally:
        endpoint.close()


ENDLESS: dict[str, Callable[[RawEndpoint], Iterator[bytes]]] = {
    "chunks": lambda raw: raw.endless(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", CHUNK),
    "a body": lambda raw: raw.endless(HEAD + b"Content-Length: 999999999999\r\n\r\n", CHUNK),
    "a body without length": lambda raw: raw.endless(HEAD + b"\r\n", CHUNK),
    "an error": lambda raw: raw.endless(b"HTTP/1.1 500 Oh\r\n\r\n", CHUNK),
}
SLOW: dict[str, Callable[[RawEndpoint], Iterator[bytes]]] = {
    "body": lambda raw: raw.endless(HEAD + b"Content-Length: 99999\r\n\r\n", b" ", pause=0.02),
    "chunks": lambda raw: raw.endless(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", pause=0.02),
    "header": lambda raw: raw.endless(HEAD + b"X: ", b"x", pause=0.02),
    "headers": lambda raw: raw.endless(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.02),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_answer_without_end_is_ended(name: str) -> None:
    with raw_endpoint(ENDLESS[name]) as raw, pytest.raises(RequestFailed, match="an answer of more than 8 MiB"):
        ask(raw.url)
    assert raw.sent < 4 * MAX_ANSWER_BYTES, "what the sockets hold, at most, beyond the limit"


def test_endless_headers_are_ended() -> None:
    endless = raw_endpoint(lambda raw: raw.endless(HEAD, b"X-A: " + b"x" * 999 + b"\r\n"))
    with endless as raw, pytest.raises(RequestFailed, match="ProtocolError"):
        ask(raw.url)
    assert raw.sent < MAX_ANSWER_BYTES


@pytest.mark.parametrize("name", SLOW)
def test_the_time_limit_is_for_the_whole_answer(name: str) -> None:
    """A byte now and then keeps no connection alive."""
    with raw_endpoint(SLOW[name]) as raw, pytest.raises(RequestFailed, match=r"no whole answer within 0\.3 s"):
        ask(raw.url, timeout=0.3)


def choices(content: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[" * 500_000,
        b'{"choices":' * 100_000,
        choices("a lone \ud800 surrogate"),
        choices(5),
        choices(["Verdict: A"]),
        choices({"text": "Verdict: A"}),
        b'{"choices": {}}',
        b'{"choices": "Verdict"}',
        b'{"choices": [[]]}',
        b'{"choices": [{"message": "Verdict: A"}]}',
        b'{"choices": [null]}',
        b"null",
        b"9" * 5000,
        b"NaN",
        choices("Verdict: A").decode().encode("utf-16"),
        gzip.compress(b" " * 10_000_000 + choices("Verdict: A")),
    ],
)
def test_what_is_no_answer_is_a_failed_request(content: bytes) -> None:
    reply = fake_endpoint(lambda asked: Reply(200, content))
    with reply as fake, pytest.raises(RequestFailed, match="not a chat completion") as error:
        ask(fake.url)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 999999 \r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 100\r\n\r\nshort",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"\x00\xff: \x80\r\n\r\n",
    ],
)
def test_what_is_no_http_is_a_failed_request(answer: bytes) -> None:
    with raw_endpoint(lambda raw: iter([answer])) as raw, pytest.raises(RequestFailed):
        ask(raw.url)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    """Nor does the key go elsewhere."""
    with fake_endpoint(lambda asked: completion("Verdict: A")) as elsewhere:
        there = b"HTTP/1.1 %d Moved\r\nLocation: %s/chat/completions\r\nContent-Length: 0\r\n\r\n"
        answer = there % (status, elsewhere.url.encode())
        with raw_endpoint(lambda raw: iter([answer])) as raw, pytest.raises(RequestFailed, match=f"HTTP {status}"):
            ask(raw.url)
        assert elsewhere.asked == [] and b"sk-hush" in raw.requests[0]


def test_they_are_counted_and_the_rest_is_judged(tmp_path: Path) -> None:
    bad = {"q1": choices("\ud800"), "q2": b"[" * 200_000, "q3": b" " * (MAX_ANSWER_BYTES + 1), "q4": b"\xff"}
    questions = [PairwiseQuestion(f"q{number}", True, f"q{number}") for number in range(8)]

    def judge(url: str, allowed: int) -> EndpointJudge:
        settings = PairwiseJudgeConfig(model="j", endpoint=url, attempts=1, concurrent_requests=4)
        return EndpointJudge(settings, allowed)

    with fake_endpoint(lambda asked: Reply(200, bad.get(asked.text, choices("Verdict: A")))) as fake:
        judge(fake.url, 4).judge(questions, tmp_path / "judged.jsonl", lambda *progress: None)
        with pytest.raises(CannotContinue, match=r"4 questions to the judge j at .* `max_failed_share` allows 3"):
            judge(fake.url, 3).judge(questions, tmp_path / "again.jsonl", lambda *progress: None)
    judged = [one.prompt_id for one in read_jsonl(tmp_path / "judged.jsonl", PairwiseJudgement)]
    assert judged == ["q0", "q5", "q6", "q7"]


@pytest.mark.parametrize("key", ["sk-hush\nX-Other: 1", "sk-h\u00fcsh", "sk-hush\x00", "\udc80sk-hush"])
def test_a_key_that_no_header_carries_is_refused_at_the_start(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = ("model=j", "endpoint=http://127.0.0.1:9/v1", "api_key_variable=JUDGE_KEY")
    config = load_config(TOY, [f"early_stopping.judge.{setting}" for setting in judge])
    monkeypatch.setattr("os.environ", {"JUDGE_KEY": key})
    with pytest.raises(UserError, match="JUDGE_KEY in the environment holds a line break or a letter beyond") as error:
        check_endpoints(config)
    assert "sk-" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://me:hush", "http://host:99999/v1", "http://[hush/v1", "http://ho\u2100st:hush/v1"]
)
def test_a_url_that_is_none_is_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="give the base URL") as error:
        load_config(TOY, ["early_stopping.judge.model=j", f"early_stopping.judge.endpoint={url}"])
    assert "hush" not in str(error.value)
