"""Nodes call node 0: who has the job's token is heard, and nothing else that comes ends node 0 or keeps it waiting."""

import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import orjson
import pytest
from places import TOY

from srlm_mega.errors import UserError
from srlm_mega.launch.preflight import roll_call as module
from srlm_mega.launch.preflight.node_report import NodeReport
from srlm_mega.launch.preflight.roll_call import TOKEN, Connection, RollCall, call, job_token

REPORT = NodeReport("n1", 1, {"torch": "2.13.0"}, (), ("10.0.0.1",), free_bytes=1)
HELLO = orjson.dumps({"rank": 1, "token": "token"}) + b"\n"


def listening() -> tuple[RollCall, int]:
    """Node 0, and its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    return RollCall(listener, "attempt 1", "token"), int(listener.getsockname()[1])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def report_as_a_node(port: int) -> None:
    line, greeting = call("127.0.0.1", [port], 1, "token", 60)
    assert greeting.attempt == "attempt 1"
    seen = replace(REPORT, clock_ahead=greeting.clock_ahead, clock_error=greeting.clock_error)
    line.send({"report": asdict(seen)})
    assert line.receive(time.monotonic() + 60) == {"go": True}
    line.close()


@pytest.mark.timing
def test_nodes_report_over_the_network_and_clocks_are_compared() -> None:
    roll_call, port = listening()
    thread = threading.Thread(target=report_as_a_node, args=(port,))
    thread.start()
    socket.create_connection(("127.0.0.1", port)).close()  # a stranger
    (caller,) = roll_call.gather(1, 60)
    assert caller.rank == 1
    assert abs(caller.report.clock_ahead) <= caller.report.clock_error + 0.001, "one machine, one clock"
    caller.connection.send({"go": True})
    thread.join()
    assert roll_call.gather(1, 0.1) == []


def report(**changed: object) -> bytes:
    """A whole call of a node with the token, whose report is changed."""
    return HELLO + orjson.dumps({"report": {**asdict(REPORT), **changed}}) + b"\n"


HOSTILE = {
    "rank is a list": (b'{"rank": [1], "token": "token"}\n', "its rank is not one of 1 to 1"),
    "rank of nobody": (b'{"rank": 7, "token": "token"}\n', "its rank is not one of 1 to 1"),
    "rank of node 0": (b'{"rank": 0, "token": "token"}\n', "its rank is not one of 1 to 1"),
    "rank is huge": (b'{"rank": 1e400, "token": "token"}\n', "not "),
    "no rank": (b'{"token": "token"}\n', "its rank is not one of 1 to 1"),
    "no token": (b'{"rank": 1}\n', "it has not this job's token"),
    "another token": (b'{"rank": 1, "token": "tokem"}\n', "it has not this job's token"),
    "token is a list": (b'{"rank": 1, "token": ["token"]}\n', "it has not this job's token"),
    "token is a surrogate": (b'{"rank": 1, "token": "\\ud800"}\n', "not "),
    "a list": (b"[1]\n", "not a JSON object"),
    "a number": (b"1\n", "not a JSON object"),
    "nothing": (b"\n", "not JSON"),
    "a web browser": (b"GET / HTTP/1.1\r\nHost: n0\r\n\r\n", "not JSON"),
    "not UTF-8": (b'{"rank": "\xff"}\n', "not JSON"),
    "zeros": (bytes(500) + b"\n", "not JSON"),
    "deep": (b"[" * 900 + b"\n", "not JSON"),
    "a long line": (b"x" * 3000, "more than 1024 bytes"),
    "no report": (HELLO + b"{}\n", "no report of this version"),
    "report is a list": (HELLO + b'{"report": [1]}\n', "no report of this version"),
    "report is not JSON": (HELLO + b"{\n", "not JSON"),
    "a report without end": (HELLO + b"x" * 1_200_000, "more than 1048576 bytes"),
    "versions is a list": (report(versions=[1]), "no report of this version"),
    "addresses are numbers": (report(addresses=[1]), "no report of this version"),
    "a field that is unknown": (report(addresses={"\x1b[2J": 1}), "no report of this version"),
    "another's report": (report(rank=2), "no report of this version"),
    "a path for a name": (report(node="../../etc/passwd"), "no report of this version"),
    "escapes for a name": (report(node="\x1b[2Jn1\n"), "no report of this version"),
    "no name": (report(node=""), "no report of this version"),
    "gone after the call": (HELLO, "ended the connection"),
}


def test_whatever_else_comes_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """All of them while node 0 waits; then the node that it waits for reports."""
    roll_call, port = listening()
    found: list[module.Caller] = []
    thread = threading.Thread(target=lambda: found.extend(roll_call.gather(1, 60)))
    thread.start()
    for what, (sent, why) in HOSTILE.items():
        stranger = socket.create_connection(("127.0.0.1", port), timeout=30)
        with stranger, suppress(OSError):  # reset where more was sent than is read
            stranger.sendall(sent)
            stranger.shutdown(socket.SHUT_WR)
            *_, answer = stranger.makefile("rb").read().splitlines()
            assert why in orjson.loads(answer)["refused"], (what, answer)
        assert thread.is_alive() and not found, what
    node = threading.Thread(target=report_as_a_node, args=(port,))
    node.start()
    thread.join()
    assert [caller.report.node for caller in found] == ["n1"]
    found[0].connection.send({"go": True})
    node.join()
    lines = capsys.readouterr().out.splitlines()
    assert all(any(why in line for line in lines) for _, why in HOSTILE.values()), "each is logged"
    assert len(lines) <= len(HOSTILE) and all(
        line.startswith("preflight: a call from 127.0.0.1 does not count: ") and len(line) < 300 for line in lines
    )


@pytest.mark.timing
def test_silent_and_slow_strangers_do_not_keep_a_node_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are places; they are sent away, and the node has its turn."""
    monkeypatch.setattr(module, "STRANGERS", 2)
    monkeypatch.setattr(module, "STRANGER_SECONDS", 0.2)
    roll_call, port = listening()
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    for stranger in strangers[:3]:
        stranger.sendall(b"{")
    node = threading.Thread(target=report_as_a_node, args=(port,))
    node.start()
    (caller,) = roll_call.gather(1, 60)
    caller.connection.send({"go": True})
    node.join()
    for stranger in strangers:
        stranger.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port))


def test_a_node_is_told_why_it_is_refused() -> None:
    roll_call, port = listening()
    thread = threading.Thread(target=roll_call.gather, args=(1, 1.0))
    thread.start()
    with pytest.raises(UserError, match=r"refused the call of node 1: it has not this job's token: give all nodes"):
        call("127.0.0.1", [port], 1, "another", 60)
    thread.join()


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.2\r\n", b'{"attempt": 1, "time": "now"}\n', b"[]\n", b""])
def test_another_service_at_the_port_is_not_node_0(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError):
            call("127.0.0.1", [server.getsockname()[1]], 1, "token", 60)
        thread.join()


@pytest.mark.timing
def test_node_0_is_found_behind_ports_that_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that says nothing, another job's node 0, a port without anybody, then ours."""
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.5)
    roll_call, port = listening()
    another, its_port = listening()
    another._token = "another job's"
    threads = [threading.Thread(target=one.gather, args=(1, 60)) for one in (roll_call, another)]
    for thread in threads:
        thread.start()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = [int(silent.getsockname()[1]), its_port, free_port(), port]
        line, greeting = call("127.0.0.1", ports, 1, "token", 60)
        with pytest.raises(UserError, match=f":{its_port} refused the call of node 1"):
            call("127.0.0.1", [its_port, free_port()], 1, "token", 0.5)
    assert greeting.attempt == "attempt 1"
    line.send({"report": asdict(REPORT)})
    another.close()
    for thread in threads:
        thread.join()


def test_who_is_interrupted_does_not_wait_for_calls() -> None:
    roll_call, _ = listening()
    found: list[list[module.Caller]] = []
    thread = threading.Thread(target=lambda: found.append(roll_call.gather(1, 600)))
    thread.start()
    roll_call.close()
    thread.join()
    assert found == [[]]


def test_a_call_that_nobody_answers_ends() -> None:
    with pytest.raises(OSError):
        call("127.0.0.1", [free_port()], 1, "token", 0.5)


def test_one_byte_after_the_other_ends_too() -> None:
    ours, theirs = socket.socketpair()
    end = threading.Event()

    def drip() -> None:
        while not end.wait(0.01):
            theirs.sendall(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        with pytest.raises(TimeoutError):
            Connection(ours).receive(time.monotonic() + 0.3)
    finally:
        end.set()
        thread.join()


def test_the_token_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's own; by hand, one that the same job and configuration lead to, and no other."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv(TOKEN, raising=False)
    own = job_token([str(TOY), "run.seed=1"])
    assert own == job_token([str(TOY), "run.seed=1"]) and len(own) == 64
    (tmp_path / "other.yaml").write_bytes(TOY.read_bytes() + b"\n")
    others = {job_token([str(TOY)]), job_token([str(tmp_path / "other.yaml"), "run.seed=1"])}
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    others.add(job_token([str(TOY), "run.seed=1"]))
    assert len(others | {own}) == 4
    monkeypatch.setenv(TOKEN, "word")
    assert job_token([]) == "word"
