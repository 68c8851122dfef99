"""Sockets that listen where they are called, and nowhere else."""

import errno
import ipaddress
import socket

LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
BACKLOG = 2048  # of a store that all ranks call at once


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
