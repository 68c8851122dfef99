"""`srlm torchrun`: torchrun, whose stores listen where ranks call them. torch's own listen on every network."""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore, run
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, static_tcp_rendezvous

from srlm_mega.launch.child_process import PARENT_PID
from srlm_mega.launch.listening import listening_socket


class BoundStore(TCPStore):
    """A store that listens at the address of its host name. It has the arguments that torchrun gives."""

    def __init__(
        self,
        host_name: str,
        port: int,
        world_size: int | None = None,
        is_master: bool = False,
        timeout: timedelta = dist.default_pg_timeout,
        multi_tenant: bool = False,
    ) -> None:
        if not is_master:
            super().__init__(host_name, port, world_size, False, timeout, multi_tenant=multi_tenant)
            return
        try:
            server = listening_socket(host_name, port)
        except OSError as error:  # of two nodes on one machine, the second calls the first one's store
            raise RuntimeError(f"no store at {host_name}, port {port}: {error.strerror}") from error
        port = server.getsockname()[1]
        super().__init__(
            host_name, port, world_size, True, timeout, multi_tenant=multi_tenant, master_listen_fd=server.detach()
        )


def main(arguments: Sequence[str]) -> None:
    """Run torchrun's agent on this node. Its ranks know its pid, to end with it."""
    os.environ[PARENT_PID] = str(os.getpid())
    dist.TCPStore = c10d_rendezvous_backend.TCPStore = static_tcp_rendezvous.TCPStore = BoundStore  # type: ignore[misc]
    run.main(list(arguments))
