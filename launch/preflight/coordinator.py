"""A check of all nodes before a job: node 0 gathers every node's report, runs an all-reduce over all ranks, and prints
what is wrong and where.

One process per node. Every wait has a limit, and a node that does not call is named.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from uuid import uuid4

import orjson
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from srlm_mega.config import Config
from srlm_mega.config.model_sizes import GIB
from srlm_mega.errors import UserError
from srlm_mega.launch.listening import first_free, free_port, in_words
from srlm_mega.launch.preflight.allreduce import (
    GroupSpeed,
    RanksOutcome,
    check_ranks,
    check_speeds,
    own_ranks,
    ranks_folder,
    read_speeds,
)
from srlm_mega.launch.preflight.disk_need import disk_need
from srlm_mega.launch.preflight.findings import Finding, check_absent, findings, to_leave_out
from srlm_mega.launch.preflight.node_report import NodeReport, local_report
from srlm_mega.launch.preflight.roll_call import Caller, RollCall, call, job_token
from srlm_mega.launch.preflight.this_node import ThisNode
from srlm_mega.run.files import write_atomic

ATTEMPT = "attempt"
HOPELESS = (
    "report",
    "GPUs",
    "host name",
    "network interface",
    "shared folder",
)  # the ranks would not start, or not find each other
SHARED_SECONDS = 3.0  # network file systems show another node's new file after a while
PATIENCE_SECONDS = 5.0


def run_preflight(
    config: Config, arguments: Sequence[str], out: Path, node: ThisNode, models: int, console: Console
) -> None:
    """Do this node's part. `arguments`: the configuration file and its overrides; `models`: model folders that the run
    writes. UserError names, on node 0, all that is wrong; on another node, that node 0 cannot be reached."""
    if node.rank > 0:
        follow(config, arguments, out, node)
        return
    begin, settings, attempt = time.monotonic(), config.launch.preflight, uuid4().hex
    out.mkdir(parents=True, exist_ok=True)
    (out / "bad_nodes").unlink(missing_ok=True)
    write_atomic(out / ATTEMPT, attempt.encode())
    others = len(node.names) - 1
    roll_call = open_roll_call(node, attempt, job_token(arguments)) if others else None
    # Calls are answered while this node checks itself; Ctrl-C does not wait for them.
    with ThreadPoolExecutor(1) as pool, closing(roll_call) if roll_call else nullcontext():
        called = pool.submit(roll_call.gather, others, settings.report_seconds) if roll_call else None
        own = look(config, node)
        write_report(out, own, attempt)
        callers = called.result() if called else []
    deadline = time.monotonic() + SHARED_SECONDS
    reports = [own, *(reported(caller, out, attempt, deadline) for caller in callers)]
    gpus, need = gpus_of(config, len(node.names)), disk_need(config, models)
    found = [
        *check_absent(node.names, node.named, reports, settings.report_seconds),
        *findings(reports, gpus, need, settings.max_clock_skew_seconds, config.world_size),
    ]
    # Ranks that cannot start or find each other would only hang until the limit, and name the wrong node.
    whole = len(node.names) >= config.launch.nodes
    go = whole and not any(finding.check in HOPELESS for finding in found)
    outcomes = all_reduce(go, callers, config, arguments, out, node)
    speeds: list[GroupSpeed] = []
    if not whole:
        console.print(
            f"No all-reduce: the layout takes launch.nodes={config.launch.nodes}, and {len(node.names)} take part (to "
            "have it tried: srun --nodes=N --ntasks-per-node=1 srlm launch preflight ...)", highlight=False
        )  # fmt: skip
    if go:
        per_node = config.launch.processes_per_node
        logs = str(out / "*.log")
        found += check_ranks(outcomes, per_node, settings.allreduce_seconds, logs)
        speeds = read_speeds(ranks_folder(out, node.name) / "groups.json")
        found += check_speeds(speeds, [report.node for report in reports], per_node, settings)
    show(reports, speeds, console)
    if found:
        raise UserError(failure_message(found, len(node.names), out))
    console.print(f"Preflight: {len(reports)} nodes are well, {time.monotonic() - begin:.0f} s", highlight=False)


def open_roll_call(node: ThisNode, attempt: str, token: str) -> RollCall:
    """Listen for the other nodes, where they call: at the first port that is free, but one, which is for the ranks.
    UserError when none is."""
    try:
        return RollCall(first_free(node.head, node.ports[:-1]), attempt, token)
    except OSError as error:
        where = f"{node.head}, port {node.ports[0]} ({error.strerror})"
        raise UserError(f"node 0 cannot take calls at {where}: give another --master-port") from None


def follow(config: Config, arguments: Sequence[str], out: Path, node: ThisNode) -> None:
    """Report to node 0 from any other node, and start ranks when it says so. UserError when it cannot be reached."""
    settings = config.launch.preflight
    try:
        node_0, greeting = call(node.head, node.ports[:-1], node.rank, job_token(arguments), settings.report_seconds)
    except OSError as error:
        raise UserError(
            f"{node.name}: no answer of node 0 at {node.head}, {in_words(node.ports[:-1])}, in "
            f"{settings.report_seconds:g} s ({error}). Give its address as this node can reach it (--master-addr), and "
            "open its ports between nodes (launch.port_range)"
        ) from None
    report = replace(
        look(config, node),
        clock_ahead=greeting.clock_ahead,
        clock_error=greeting.clock_error,
        sees_head=sees(out / ATTEMPT, greeting.attempt, time.monotonic() + SHARED_SECONDS),
    )
    with suppress(OSError):  # node 0 reports that it does not find it
        write_report(out, report, greeting.attempt)
    try:
        node_0.send({"report": asdict(report)})
        patience = settings.report_seconds + PATIENCE_SECONDS + SHARED_SECONDS
        match node_0.receive(time.monotonic() + patience):
            case {"go": True, "port": int(port)}:
                node_0.send({"outcome": asdict(own_ranks(config, arguments, out, node, port))})
    except OSError as error:
        raise UserError(f"{node.name}: node 0 went away during the preflight ({error}): see its messages") from None
    finally:
        node_0.close()


def look(config: Config, node: ThisNode) -> NodeReport:
    """Run this node's own checks."""
    with_gpus = gpus_of(config, len(node.names)) is not None
    seconds = config.launch.preflight.check_seconds
    return local_report(node.name, node.rank, config.run.dir, with_gpus, seconds)


def gpus_of(config: Config, nodes: int) -> int | None:
    """Return the GPUs needed on each node: training's where it has nodes enough, else sampling's; None on CPUs."""
    sampler = config.sampler
    if config.trainer.device == "cuda" and nodes >= config.launch.nodes:
        return config.launch.processes_per_node
    if config.sampler.device == "cuda" or config.sampler.traits.needs_gpu:
        return min(sampler.num_devices, sampler.devices_per_node)
    return None


def write_report(out: Path, report: NodeReport, attempt: str) -> None:
    """Write `out`/NODE.json, for people to read and for node 0 to find in the shared folder."""
    content = {"attempt": attempt, **asdict(report)}
    write_atomic(out / f"{report.node}.json", orjson.dumps(content, option=orjson.OPT_INDENT_2))


def sees(file: Path, attempt: str, deadline: float) -> bool:
    """Tell whether a file that another node wrote in this attempt appears before `deadline` (`time.monotonic()`)."""
    while True:
        with suppress(OSError):
            if attempt in file.read_text():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def reported(caller: Caller, out: Path, attempt: str, deadline: float) -> NodeReport:
    """Return a caller's report, with whether node 0 sees the file that it wrote."""
    return replace(caller.report, head_sees=sees(out / f"{caller.report.node}.json", attempt, deadline))


def all_reduce(
    go: bool, callers: Sequence[Caller], config: Config, arguments: Sequence[str], out: Path, node: ThisNode
) -> list[RanksOutcome]:
    """Tell all nodes whether to start ranks (those behind launch.nodes have none); return how these ended, by node."""
    with_ranks = [caller for caller in callers if go and caller.rank < config.launch.nodes]
    port = free_port(node.head, node.ports) if go else None  # nobody listens for calls any more
    for caller in callers:
        with suppress(OSError):  # it will be missed below
            caller.connection.send({"go": caller in with_ranks, "port": port})
    if port is None:
        return []
    outcomes = [own_ranks(config, arguments, out, node, port)]
    deadline = time.monotonic() + PATIENCE_SECONDS
    for caller in with_ranks:
        try:
            said = caller.connection.receive(deadline).get("outcome")
            outcomes.append(TypeAdapter(RanksOutcome).validate_python(said))
        except (OSError, ValueError) as error:
            why = f"no outcome came from the node: {error}".partition("\n")[0]
            first = caller.rank * config.launch.processes_per_node
            outcomes.append(RanksOutcome(caller.report.node, first, False, (), why))
        caller.connection.close()
    return outcomes


def show(reports: Sequence[NodeReport], speeds: Sequence[GroupSpeed], console: Console) -> None:
    """Print a line per node, and one per axis with its slowest group."""
    nodes = Table("node", "torch", "GPUs", "free disk", "clock", "address", box=None)
    for report in reports:
        free = "?" if report.free_bytes is None else f"{report.free_bytes / GIB:.0f} GiB"
        gpus = "-" if report.gpus is None else str(len(report.gpus))
        clock = f"{report.clock_ahead:+.2f} s"
        torch = report.versions.get("torch", "absent")
        nodes.add_row(report.node, torch, gpus, free, clock, ", ".join(report.addresses or ("?",)))
    console.print(nodes)
    for axis in dict.fromkeys(speed.axis for speed in speeds):
        own = [speed for speed in speeds if speed.axis == axis]
        slowest = min(own, key=lambda speed: speed.gbytes_per_second)
        console.print(
            f"{axis}: {len(own)} x {len(slowest.ranks)} ranks, slowest {slowest.gbytes_per_second:.3g} GB/s",
            highlight=False,
        )


def failure_message(found: Sequence[Finding], nodes: int, out: Path) -> str:
    """Return the message; nodes that a job should leave out are written to `out`/bad_nodes."""
    bad = to_leave_out(found, nodes)
    if bad:
        write_atomic(out / "bad_nodes", "".join(f"{node}\n" for node in bad).encode())
    return "preflight:\n" + "\n".join(f"  - {finding}" for finding in found)
