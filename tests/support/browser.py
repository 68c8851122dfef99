"""A headless Chromium, told what to do by the DevTools protocol over a pipe: real clicks, keys and pixels."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

import pytest

TIMEOUT_SECONDS = 120
KEYS = {"ArrowDown": 40, "ArrowUp": 38, "Enter": 13, "Escape": 27, "Tab": 9, "End": 35, "/": 191}


class Tab:
    """One page of a browser. `complaints` are what it logged: errors, warnings, refused requests, exceptions."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, os.fdopen(answers, "rb")
        self._number, self._session = 0, ""
        self._events: list[str] = []
        self._rest = b""
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command, take events until its answer comes."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, page: Path, fragment: str = "") -> None:
        """Go to a file, also to one that is open already, and wait until it is loaded."""
        for url in ("about:blank", page.resolve().as_uri() + fragment):
            self._events.clear()
            answer = self.call("Page.navigate", url=url)
            assert "errorText" not in answer, f"{url}: {answer['errorText']}"
            while "Page.loadEventFired" not in self._events:
                self._receive()

    def look(self, width: int = 1280, height: int = 900, scheme: str = "light", media: str = "screen") -> None:
        """Which window and which preferences the page finds."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        feature = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=feature)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true in the page."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"never true: {condition}"
            time.sleep(0.02)

    def key(self, name: str) -> None:
        """Press and release one key."""
        code = {"key": name, "windowsVirtualKeyCode": KEYS[name]}
        text = {"Enter": "\r", "/": "/"}.get(name)
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def type(self, text: str) -> None:
        """Put text where the focus is."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """What is in the window, or all of the page."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select([self._answers], [], [], TIMEOUT_SECONDS)[0], f"no answer, after {self._events}"
            part = self._answers.raw.read(1 << 20)  # type: ignore[attr-defined]
            assert part, "the browser ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        method = answer.get("method", "")
        self._events.append(method)
        if method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(answer["params"]))
        return answer


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A browser without network; the test is skipped where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    commands_read, commands_write = os.pipe()
    answers_read, answers_write = os.pipe()
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
        *("--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run", "--disable-background-networking"),
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    redirected = f'exec "$0" "$@" 3<&{commands_read} 4>&{answers_write}'
    process = subprocess.Popen(
        ["bash", "-c", redirected, program, *options, "about:blank"],
        pass_fds=(commands_read, answers_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_read)
    os.close(answers_write)
    try:
        yield Tab(commands_write, answers_read)
    finally:
        process.terminate()
        process.wait(TIMEOUT_SECONDS)
        os.close(commands_write)
