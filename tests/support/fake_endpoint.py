"""An OpenAI-compatible endpoint in this process, for tests: what it answers is a function of the test's."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson

os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # for this process and those it starts
QUESTION = re.compile(
    r"User's question:\n(.*?)\n\n<response_a>\n(.*?)\n</response_a>\n\n<response_b>\n(.*?)\n</resp", re.S
)


@dataclass(frozen=True)
class Asked:
    """One request: its JSON body and headers."""

    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def text(self) -> str:
        """The user's turn."""
        return str(self.body["messages"][-1]["content"])

    @property
    def parts(self) -> tuple[str, str, str]:
        """Instruction, response A, response B of a pairwise question."""
        found = QUESTION.search(self.text)
        assert found is not None, self.text
        return found[1], found[2], found[3]


@dataclass(frozen=True)
class Reply:
    """Status and body of a response; `hang`: never answer."""

    status: int = 200
    body: bytes = b""
    hang: bool = False


@dataclass
class FakeEndpoint:
    """What came in, and where it listens."""

    url: str = ""
    asked: list[Asked] = field(default_factory=list)


def completion(text: str, finish_reason: str = "stop") -> Reply:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return Reply(200, orjson.dumps({"object": "chat.completion", "choices": [choice]}))


@contextmanager
def fake_endpoint(reply: Callable[[Asked], Reply]) -> Iterator[FakeEndpoint]:
    """Serve on a free port until the block ends."""
    endpoint, over = FakeEndpoint(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            asked = Asked(orjson.loads(content), dict(self.headers))
            endpoint.asked.append(asked)
            assert self.path == "/v1/chat/completions", self.path
            answer = reply(asked)
            if answer.hang:
                over.wait()
                return
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()
