"""The timed all-reduce of a preflight: this node's ranks, started for a short time, and what they and their speeds say
about nodes and the network between them. The ranks are training/allreduce_check.py and leave their places in files."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

from srlm_mega.config import Config
from srlm_mega.config.launch import PreflightConfig
from srlm_mega.launch.child_process import die_with, environment
from srlm_mega.launch.preflight.findings import Finding
from srlm_mega.launch.preflight.this_node import ThisNode
from srlm_mega.launch.ranks import Rendezvous, ranks_on_node

CONSEQUENCES = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
NETWORK = "Name the network (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_IB_HCA) and look at NCCL_DEBUG=INFO"


@dataclass(frozen=True)
class GroupSpeed:
    """One group of ranks that adds up its buffers. `gbytes_per_second`: bus bandwidth, 2 (k - 1) / k * bytes / time."""

    axis: str
    ranks: tuple[int, ...]
    gbytes_per_second: float


@dataclass(frozen=True)
class RankPlace:
    """The last place a rank came to; `count` of them with it."""

    rank: int
    count: int
    name: str


@dataclass(frozen=True)
class RanksOutcome:
    """How the ranks of one node ended. Ranks that did not begin have no place. `error`: what one of them died of."""

    node: str
    first_rank: int
    in_time: bool
    places: tuple[RankPlace, ...]
    error: str = ""


def own_ranks(config: Config, arguments: Sequence[str], out: Path, node: ThisNode) -> RanksOutcome:
    """This node's ranks of the all-reduce."""
    folder, per_node = ranks_folder(out, node.name), config.launch.processes_per_node
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    launch = config.launch.model_copy(update={"rendezvous": "static"})
    program = [sys.executable, "-m", "srlm_mega.training.allreduce_check", str(folder), *arguments]
    rendezvous = Rendezvous(node.head, node.port + 1, id="")
    argv = ranks_on_node(Path(sys.executable).parent, program, launch, rendezvous, node.rank)
    settings = environment(os.environ, config.launch.threads_per_process, cpu=config.trainer.device == "cpu")
    seconds = config.launch.preflight.allreduce_seconds
    return run_ranks(argv, settings, node.name, node.rank * per_node, folder, out / f"{node.name}.log", seconds)


def ranks_folder(out: Path, node: str) -> Path:
    """Where a node's ranks say how far they are."""
    return out / f"{node}.ranks"


def read_speeds(file: Path) -> list[GroupSpeed]:
    """What rank 0 measured; nothing when the ranks did not come to their end."""
    return TypeAdapter(list[GroupSpeed]).validate_json(file.read_bytes()) if file.is_file() else []


def run_ranks(
    argv: Sequence[str],
    environment: Mapping[str, str],
    node: str,
    first_rank: int,
    folder: Path,
    log_file: Path,
    seconds: float,
) -> RanksOutcome:
    """Run torchrun's `argv` for at most `seconds`. Its ranks write `folder`/rank_N: a count, a place, perhaps an error
    behind a line's end."""
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=partial(die_with, os.getpid()),
        )
        try:
            code, in_time = process.wait(seconds), True
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code, in_time = process.wait(), False
    read = {int(file.name.removeprefix("rank_")): file.read_text() for file in folder.glob("rank_*")}
    errors = [f"rank {rank}: {error}" for rank, text in sorted(read.items()) if (error := text.partition("\n")[2])]
    if in_time and code and not errors:  # torchrun, or a rank that was killed
        errors = [f"torchrun ended with {code}: {last_line(log_file)}"]
    places = tuple(read_place(rank, text) for rank, text in sorted(read.items()))
    return RanksOutcome(node, first_rank, in_time, places, "; ".join(errors))


def read_place(rank: int, text: str) -> RankPlace:
    """From its file's first line: `3 the all-reduce of DP`."""
    count, _, name = text.partition("\n")[0].partition(" ")
    return RankPlace(rank, int(count), name)


def last_line(log_file: Path) -> str:
    """What was said last."""
    lines = log_file.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing said")


def check_ranks(outcomes: Sequence[RanksOutcome], per_node: int, seconds: float, logs: str) -> Iterator[Finding]:
    """Ranks that crashed, or that the others waited for in vain."""
    crashed = [outcome for outcome in outcomes if outcome.error]
    causes = [outcome for outcome in crashed if not any(words in outcome.error for words in CONSEQUENCES)]
    remedy = f"`srlm doctor` on this node says more; the log is in {logs}"
    for outcome in causes or crashed:
        yield Finding(outcome.node, "all-reduce", outcome.error, "ranks that start and meet", remedy, (outcome.node,))
    if crashed or all(outcome.in_time for outcome in outcomes):
        return
    places = {outcome.node: every_place(outcome, per_node) for outcome in outcomes}
    furthest = max((place for own in places.values() for place in own), key=lambda place: place.count)
    behind = {node: [place for place in own if place.count < furthest.count] for node, own in places.items()}
    if not any(behind.values()):
        got = f"no end in {seconds:g} s: all ranks are in {furthest.name}"
        yield Finding(", ".join(places), "all-reduce", got, "an end", f"{NETWORK}; stacks of all ranks are in {logs}")
    remedy = f"{NETWORK} on this node; stacks of its ranks are in {logs}"
    for node, late in behind.items():
        if late:
            got = f"{', '.join(f'rank {place.rank} in {place.name}' for place in late)} after {seconds:g} s"
            yield Finding(node, "all-reduce", got, f"all ranks in {furthest.name}", remedy, (node,))


def every_place(outcome: RanksOutcome, per_node: int) -> list[RankPlace]:
    """Of all ranks that the node should have."""
    known = {place.rank: place for place in outcome.places}
    ranks = range(outcome.first_rank, outcome.first_rank + per_node)
    return [known.get(rank, RankPlace(rank, 0, "its start")) for rank in ranks]


def check_speeds(
    groups: Sequence[GroupSpeed], nodes: Sequence[str], per_node: int, limits: PreflightConfig
) -> Iterator[Finding]:
    """Groups below the floor. A node is to blame when it is in slow groups and in no other group of that axis, while
    other nodes do better."""
    for axis in dict.fromkeys(group.axis for group in groups):
        own = [group for group in groups if group.axis == axis]
        slow = [group for group in own if group.gbytes_per_second < floor_of(group, per_node, limits)]
        well = {node for group in own if group not in slow for node in nodes_of(group, nodes, per_node)}
        for group in slow:
            members = nodes_of(group, nodes, per_node)
            key = "floor_within_node" if len(members) == 1 else "floor_between_nodes"
            suspects = tuple(node for node in members if node not in well) if well else ()
            got = f"{group.gbytes_per_second:.3g} GB/s among ranks {', '.join(map(str, group.ranks))}"
            wanted = f"at least {floor_of(group, per_node, limits):g} GB/s"
            remedy = f"{NETWORK}; or set launch.preflight.{key} to what is right here"
            yield Finding(", ".join(members), f"all-reduce, {axis}", got, wanted, remedy, suspects)


def nodes_of(group: GroupSpeed, nodes: Sequence[str], per_node: int) -> tuple[str, ...]:
    """The nodes that a group's ranks are on; torchrun numbers them node by node."""
    return tuple(dict.fromkeys(nodes[rank // per_node] for rank in group.ranks))


def floor_of(group: GroupSpeed, per_node: int, limits: PreflightConfig) -> float:
    """GB/s that the group must reach."""
    one_node = len({rank // per_node for rank in group.ranks}) == 1
    return limits.floor_within_node if one_node else limits.floor_between_nodes
