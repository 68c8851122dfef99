"""Sockets listen at the address that others call, where that can be known."""

import socket
from collections.abc import Callable

import pytest

from srlm_mega.launch import listening
from srlm_mega.launch.listening import listening_socket

EVERYWHERE = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"


def leading_to(*addresses: str) -> Callable[..., list[object]]:
    """A name service that knows these addresses of every name."""
    return lambda host, port, type: [(socket.AF_INET, type, 6, "", (address, port)) for address in addresses]


@pytest.mark.parametrize(
    ("host", "addresses", "where"),
    [
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
        ("localhost", ["127.0.0.1"], "127.0.0.1"),
        ("0.0.0.0", ["192.0.2.1"], EVERYWHERE),
        ("n0", ["127.0.1.1"], EVERYWHERE),  # as Debian's installer writes it: the others know another address
        ("n0", ["192.0.2.1"], EVERYWHERE),  # a router's, behind which this machine is
    ],
)
def test_where_it_listens(host: str, addresses: list[str], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening.socket, "getaddrinfo", leading_to(*addresses))
    with listening_socket(host, 0) as server:
        assert server.getsockname()[0] == where


def test_a_nodes_own_address() -> None:
    """Another interface than the loopback's, where this machine has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("no interface but the loopback's")
        own = probe.getsockname()[0]
    with listening_socket(own, 0) as server:
        assert server.getsockname()[0] == own
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.getsockname()[1]), timeout=5)
        with pytest.raises(OSError, match="in use"):
            listening_socket(own, server.getsockname()[1])
