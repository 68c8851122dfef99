"""Which of the nodes this is, and where node 0 is: from options, or from what Slurm says."""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from srlm_mega.errors import UserError
from srlm_mega.launch.ranks import port_of

TOP_LEVEL_COMMA = re.compile(r",(?![^\[]*\])")


@dataclass(frozen=True)
class ThisNode:
    """Which of the job's nodes this is. `names`: of all nodes by their rank; `named`: as Slurm knows them, else only
    this one's is the host's. Nodes call node 0 at `head`:`port`; the ranks meet at the port behind it."""

    rank: int
    names: tuple[str, ...]
    named: bool
    head: str
    port: int

    @property
    def name(self) -> str:
        """This node."""
        return self.names[self.rank]


def this_node(
    environment: Mapping[str, str], rank: int | None, nodes: int | None, head: str | None, port: int | None
) -> ThisNode:
    """What the options leave open is Slurm's: a task per node. UserError when it is not clear who is who."""
    own_name = environment.get("SLURMD_NODENAME", socket.gethostname())
    count = nodes or int(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")))
    own = rank if rank is not None else int(environment.get("SLURM_PROCID", "0"))
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
    return ThisNode(
        own, tuple(names), named, address or "127.0.0.1", port or port_of(int(environment.get("SLURM_JOB_ID", "0")))
    )


def expand(compact: str) -> list[str]:
    """Slurm's short form, `gpu[08-10,12],login1`, in full; containers have no scontrol to ask."""
    names: list[str] = []
    for item in TOP_LEVEL_COMMA.split(compact):
        head, bracket, rest = item.partition("[")
        if not bracket:
            names += [head] if head else []
            continue
        ranges, _, tail = rest.partition("]")
        numbers = [number for part in ranges.split(",") for number in spelt_out(part)]
        names += [head + number + end for number in numbers for end in expand(tail) or [""]]
    return names


def spelt_out(part: str) -> list[str]:
    """`08-10` is 08, 09, 10."""
    first, _, last = part.partition("-")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
