"""This node's rank among the job's nodes, and the address of node 0: from options, or from Slurm's variables."""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from srlm_mega.errors import UserError
from srlm_mega.launch.listening import EVERYWHERE, LOOPBACK, ports_of
from srlm_mega.launch.ranks import number_in

TOP_LEVEL_COMMA = re.compile(r",(?![^\[]*\])")


@dataclass(frozen=True)
class ThisNode:
    """This node among the job's nodes. `names` are by node rank; if `named` they are Slurm's, else only this one's is a
    host's. Nodes call node 0 at `head` and the first of `ports` at which it answers; one of them, which node 0
    tells, is for the ranks' rendezvous. Node 0 listens there, and everywhere when it was not told where others call."""

    rank: int
    names: tuple[str, ...]
    named: bool
    head: str
    ports: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of this node."""
        return self.names[self.rank]


def this_node(
    environment: Mapping[str, str],
    rank: int | None,
    nodes: int | None,
    head: str | None,
    port: int | None,
    port_range: tuple[int, int],
) -> ThisNode:
    """Fill in from Slurm's variables (one task per node) what options leave open. UserError when that is not enough."""
    own_name = environment.get("SLURMD_NODENAME", socket.gethostname())
    count = nodes or number_in(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)
    own = rank if rank is not None else number_in(environment, "SLURM_PROCID", default=0)
    if not 0 <= own < count:
        raise UserError(f"node rank {own} of {count} nodes: ranks go from 0 to {count - 1}; start one task per node")
    listed = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    names = expand(listed) if count > 1 else []
    named = len(names) == count
    names = names if named else [f"node {other}" for other in range(count)]
    names[own] = own_name
    address = head or environment.get("MASTER_ADDR") or (names[0] if named else None)
    if count > 1 and own > 0 and address is None:
        raise UserError(f"{own_name} does not know where node 0 is: give --master-addr (or MASTER_ADDR)")
    job = number_in(environment, "SLURM_JOB_ID", default=0)
    head = (address or EVERYWHERE) if count > 1 else LOOPBACK
    return ThisNode(own, tuple(names), named, head, ports_of(job, port_range) if port is None else (port, port + 1))


def expand(compact: str) -> list[str]:
    """Return the names in Slurm's short form, such as `gpu[08-10,12],login1`; containers have no scontrol to ask."""
    names: list[str] = []
    for item in TOP_LEVEL_COMMA.split(compact):
        head, bracket, rest = item.partition("[")
        if not bracket:
            names += [head] if head else []
            continue
        ranges, _, tail = rest.partition("]")
        numbers = [number for part in ranges.split(",") for number in expand_range(part)]
        names += [head + number + end for number in numbers for end in expand(tail) or [""]]
    return names


def expand_range(part: str) -> list[str]:
    """Expand a range: `08-10` is 08, 09, 10. UserError where it is none."""
    first, _, last = part.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()):
        raise UserError(f"Slurm's list of nodes has the range [{part}], which is not one of numbers such as 08-10")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
