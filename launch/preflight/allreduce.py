"""The timed all-reduce of a preflight: this node's ranks run for a short time, and their ends and speeds tell which
node or network is at fault. The ranks are training/allreduce_check.py and write their progress to files."""

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
from srlm_mega.launch.child_process import die_with, environment, srlm_command
from srlm_mega.launch.preflight.findings import Finding
from srlm_mega.launch.preflight.this_node import ThisNode
from srlm_mega.launch.ranks import Rendezvous, ranks_on_node

CONSEQUENCES = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
START = "its start"  # the place of a rank that has not loaded torch yet
END = "the end"  # and of one that has done all its all-reduces
LIMIT = "launch.preflight.allreduce_seconds"
NETWORK = "Name the network (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_IB_HCA) and look at NCCL_DEBUG=INFO"


@dataclass(frozen=True)
class GroupSpeed:
    """One group of ranks that adds up its buffers; bus bandwidth is 2 (k - 1) / k * bytes / seconds for k ranks."""

    axis: str
    ranks: tuple[int, ...]
    gbytes_per_second: float


@dataclass(frozen=True)
class RankPlace:
    """The last place that a rank reached: its number in order, and its name."""

    rank: int
    count: int
    name: str


@dataclass(frozen=True)
class RanksOutcome:
    """The end of one node's ranks. Ranks that did not start have no place. `error`: the reason that a rank died."""

    node: str
    first_rank: int
    in_time: bool
    places: tuple[RankPlace, ...]
    error: str = ""


def own_ranks(config: Config, arguments: Sequence[str], out: Path, node: ThisNode, port: int) -> RanksOutcome:
    """Run this node's ranks of the all-reduce, which meet at a port of node 0."""
    folder, per_node = ranks_folder(out, node.name), config.launch.processes_per_node
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    launch = config.launch.model_copy(update={"rendezvous": "static"})
    program = [sys.executable, "-m", "srlm_mega.training.allreduce_check", str(folder), *arguments]
    rendezvous = Rendezvous(node.head, port, id="")
    argv = ranks_on_node(srlm_command(), program, launch, rendezvous, node.rank)
    cpu, one_node = config.trainer.device == "cpu", len(node.names) == 1
    settings = environment(os.environ, config.training_threads, cpu, one_node)
    seconds = config.launch.preflight.allreduce_seconds
    return run_ranks(argv, settings, node.name, node.rank * per_node, folder, out / f"{node.name}.log", seconds)


def ranks_folder(out: Path, node: str) -> Path:
    """Return the folder in which a node's ranks write their progress."""
    return out / f"{node}.ranks"


def read_speeds(file: Path) -> list[GroupSpeed]:
    """Read what rank 0 measured; nothing when the ranks did not finish."""
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
    """Run torchrun's `argv` for at most `seconds`. Rank N writes `folder`/rank_N: a count and a place, then errors."""
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that a kill reaches torchrun and all its ranks
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
    """Parse the first line of a rank's file, such as `3 the all-reduce of DP`."""
    count, _, name = text.partition("\n")[0].partition(" ")
    return RankPlace(rank, int(count), name)


def last_line(log_file: Path) -> str:
    """Return the last line of a log that is not empty."""
    lines = log_file.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing said")


def check_ranks(outcomes: Sequence[RanksOutcome], per_node: int, seconds: float, logs: str) -> Iterator[Finding]:
    """Find ranks that crashed, or that the others waited for in vain. `seconds` is the limit they had."""
    crashed = [outcome for outcome in outcomes if outcome.error]
    # A rank that lost its partner says so as well: only the others name a cause, if there are any.
    causes = [outcome for outcome in crashed if not any(words in outcome.error for words in CONSEQUENCES)]
    wanted, remedy = "ranks that find each other", f"`srlm doctor` on this node says more; the log is in {logs}"
    for outcome in causes or crashed:
        yield Finding(outcome.node, "all-reduce", outcome.error, wanted, remedy, (outcome.node,))
    if crashed or all(outcome.in_time for outcome in outcomes):
        return
    places = {outcome.node: every_place(outcome, per_node) for outcome in outcomes}
    furthest = max((place for own in places.values() for place in own), key=lambda place: place.count)
    behind = {node: [place for place in own if place.count < furthest.count] for node, own in places.items()}
    slow = f"Raise {LIMIT}: starting and ending take long here (a busy file system?); the log is in {logs}"
    if not any(behind.values()):
        got, remedy = f"no end in {seconds:g} s: all ranks are in {furthest.name}", slow
        if furthest.name == START:
            got = f"ranks that started slowly: none had loaded torch after {seconds:g} s"
        elif furthest.name == END:
            got = f"ranks that ended slowly: the all-reduces had worked, and not all had ended after {seconds:g} s"
        else:
            remedy = f"{NETWORK}, or raise {LIMIT}; stacks of all ranks are in {logs}"
        yield Finding(", ".join(places), "all-reduce", got, f"an end within {LIMIT}={seconds:g}", remedy)
    for node, late in behind.items():
        if late:
            got = f"{', '.join(f'rank {place.rank} in {place.name}' for place in late)} after {seconds:g} s"
            remedy = f"{NETWORK} on this node, or raise {LIMIT} where it is only slow; its ranks' stacks are in {logs}"
            if all(place.name == START for place in late):
                remedy = slow
            yield Finding(node, "all-reduce", got, f"all ranks in {furthest.name}", remedy, (node,))


def every_place(outcome: RanksOutcome, per_node: int) -> list[RankPlace]:
    """Return the places of all ranks that the node should have."""
    known = {place.rank: place for place in outcome.places}
    ranks = range(outcome.first_rank, outcome.first_rank + per_node)
    return [known.get(rank, RankPlace(rank, 0, START)) for rank in ranks]


def check_speeds(
    groups: Sequence[GroupSpeed], nodes: Sequence[str], per_node: int, limits: PreflightConfig
) -> Iterator[Finding]:
    """Find groups below the floor, and nodes whose groups of an axis are all slow while other nodes do better."""
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
    """Return the nodes of a group's ranks; torchrun numbers ranks node by node."""
    return tuple(dict.fromkeys(nodes[rank // per_node] for rank in group.ranks))


def floor_of(group: GroupSpeed, per_node: int, limits: PreflightConfig) -> float:
    """Return the bus bandwidth that the group must reach, in GB/s."""
    one_node = len({rank // per_node for rank in group.ranks}) == 1
    return limits.floor_within_node if one_node else limits.floor_between_nodes
