"""Sockets that listen where they are called, and nowhere else."""

import errno
import ipaddress
import socket
from collections.abc import Sequence
from contextlib import closing

from srlm_mega.errors import UserError

LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
BACKLOG = 2048  # of a store that all ranks call at once
CANDIDATES, STRIDE = 16, 1237  # a prime: candidates of jobs that follow one another lie apart


def ports_of(job: int, port_range: tuple[int, int]) -> tuple[int, ...]:
    """Return the ports that a job's nodes try, in order; they follow from its number, so that all nodes know them."""
    first, last = port_range
    size = last - first + 1
    return tuple(dict.fromkeys(first + (job + number * STRIDE) % size for number in range(min(CANDIDATES, size))))


def first_free(host: str, ports: Sequence[int]) -> socket.socket:
    """Return a socket that listens at the first of these ports that no other has on this machine, at `host` as
    `listening_socket` does. UserError names those that are taken."""
    for port in ports:
        try:
            return listening_socket(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise UserError(
        f"{in_words(ports)} on {host} {'is' if len(ports) == 1 else 'are'} taken (`ss -ltnp` shows by whom): give "
        "others (launch.port_range, or --master-port of the preflight)"
    )


def in_words(ports: Sequence[int]) -> str:
    """Return `port 1` or `ports 1, 2`."""
    return f"port{'' if len(ports) == 1 else 's'} {', '.join(map(str, ports))}"


def free_port(host: str, ports: Sequence[int]) -> int:
    """Return the first of these ports that is free on this machine now. UserError when none is."""
    with closing(first_free(host, ports)) as listener:
        port: int = listener.getsockname()[1]
        return port


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens at the address that `host` has on this machine. A name that leads here to 127.0.x.x
    or to another machine's address says nothing about where other nodes call: then it listens everywhere. OSError when
    the port is taken."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if host != EVERYWHERE else []
    for family, _, _, _, place in found:
        address = ipaddress.ip_address(str(place[0]).partition("%")[0])
        if address.is_loopback and host not in ("localhost", str(place[0])):
            continue
        try:
            return socket.create_server((str(place[0]), port), family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
