"""Faults of a set of nodes: pure functions from the nodes' reports to findings in words."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median_low

from srlm_mega.config.model_sizes import GIB
from srlm_mega.launch.preflight.disk_need import DiskNeed
from srlm_mega.launch.preflight.node_report import NodeReport

ECC = "ECC"
# Locked by each rank for RDMA, over InfiniBand or RoCE: NCCL's buffers in host memory are 4 MiB (NCCL_BUFFSIZE) for
# each channel of each connection, tens to hundreds of MiB in all. Linux allows 64 KiB or, since 5.16, 8 MiB by itself;
# a limit from here on was chosen by an administrator.
LOCKED_BYTES = GIB


@dataclass(frozen=True)
class Finding:
    """One fault. `blamed`: nodes that a job should leave out."""

    node: str
    check: str
    got: str
    wanted: str
    remedy: str
    blamed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.node}: {self.check}: got {self.got}, wanted {self.wanted}. {self.remedy}"


def findings(
    reports: Sequence[NodeReport], gpus: int | None, need: DiskNeed, max_clock_skew: float, ranks: int = 1
) -> list[Finding]:
    """Return all faults of the nodes that reported. `gpus` per node, None on CPUs; `max_clock_skew` in seconds; `ranks`
    of all nodes."""
    rdma = gpus is not None and len(reports) > 1  # gloo, for CPUs, takes TCP, and NCCL within a node shared memory
    return [
        *(finding for report in reports for finding in check_answers(report)),
        *check_versions(reports),
        *(finding for report in reports for finding in check_gpus(report, gpus)),
        *(finding for report in reports for finding in check_name(report, len({one.network for one in reports}) == 1)),
        *(finding for report in reports for finding in check_limits(report, ranks, rdma)),
        *check_shared_folder(reports),
        *(finding for report in reports for finding in check_disk(report, need)),
        *check_clocks(reports, max_clock_skew),
    ]


def to_leave_out(found: Sequence[Finding], nodes: int) -> list[str]:
    """Return the names of the nodes to blame. A fault of more than half of them is no node's, memory errors apart: the
    job would only come back on others that are no better."""
    blamed: set[str] = set()
    for check in {finding.check for finding in found}:
        own = {node for finding in found if finding.check == check for node in finding.blamed}
        if 2 * len(own) <= nodes or check == ECC:
            blamed |= own
    return sorted(blamed)


def check_absent(names: Sequence[str], named: bool, reports: Sequence[NodeReport], seconds: float) -> Iterator[Finding]:
    """Find nodes that did not report within `seconds`. `names` are by node rank, and the hosts' own if `named`. When
    all but node 0 are silent, the fault is more likely node 0's."""
    present = {report.rank for report in reports}
    absent = [rank for rank in range(len(names)) if rank not in present]
    alone = len(names) > 2 and len(absent) == len(names) - 1
    remedy = (
        "No other node reached node 0: check its address (--master-addr), that the port is open between nodes, and "
        "that this was started on every node (srun --ntasks-per-node=1)"
        if alone
        else "Look at the node (is it up, does it reach node 0?), or leave it out: --exclude"
    )
    for rank in absent:
        blamed = (names[rank],) if named and not alone else ()
        yield Finding(names[rank], "report", f"none in {seconds:g} s", "one from each node", remedy, blamed)


def check_answers(report: NodeReport) -> Iterator[Finding]:
    """Find checks that hung or failed on the node itself."""
    remedy = "Log in and try by hand what hangs or fails, or leave the node out"
    for check, why in (report.unanswered or {}).items():
        yield Finding(report.node, check, why, "an answer", remedy, (report.node,))


def check_versions(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """Find packages, Python, drivers or kinds of GPU that differ; what most nodes have counts as right."""
    for package in sorted({package for report in reports for package in report.versions}):
        found = {report.node: report.versions.get(package, "absent") for report in reports}
        (common, count), *others = Counter(found.values()).most_common()
        if not others:
            continue
        if 2 * count <= len(found):
            got = "; ".join(f"{package} {version} on {node}" for node, version in found.items())
            remedy = "Start from one environment or one container image on all nodes"
            yield Finding(", ".join(found), "versions", got, "the same on all nodes", remedy)
            continue
        wanted = f"{package} {common}, as on {count} of {len(found)} nodes"
        remedy = "Bring this node's environment to that of the others, or leave it out"
        for node in (node for node, version in found.items() if version != common):
            yield Finding(node, "versions", f"{package} {found[node]}", wanted, remedy, (node,))


def check_gpus(report: NodeReport, wanted: int | None) -> Iterator[Finding]:
    """Find a node with fewer GPUs than processes, and GPUs with memory errors."""
    if wanted is None or report.gpus is None:
        return
    if len(report.gpus) < wanted:
        due = f"{wanted}, one for each of launch.processes_per_node"
        remedy = "Ask for more GPUs per node, lower launch.processes_per_node, or leave the node out if one has failed"
        yield Finding(report.node, "GPUs", str(len(report.gpus)), due, remedy, (report.node,))
    remedy = "Leave the node out until its administrator has reset or replaced the GPU"
    for number, gpu in enumerate(report.gpus):
        if gpu.ecc_errors:
            got = f"{gpu.ecc_errors} uncorrected errors on GPU {number} ({gpu.name})"
            yield Finding(report.node, ECC, got, "0", remedy, (report.node,))


def check_limits(report: NodeReport, ranks: int, rdma: bool) -> Iterator[Finding]:
    """Find a node whose processes may open too few files, connections counted, or lock too little memory for
    `rdma` between nodes."""
    raised = "Raise it in the shell that submits, as Slurm hands its limits on, or have the administrator raise"
    wanted = 512 + 8 * ranks
    if report.open_files is not None and report.open_files < wanted:
        due = f"{wanted}: 512, and 8 for connections with each of {ranks} ranks"
        remedy = f"{raised} LimitNOFILE of slurmd's unit"
        yield Finding(report.node, "ulimit -n", str(report.open_files), due, remedy, (report.node,))
    if rdma and report.infiniband and report.locked_bytes is not None and report.locked_bytes < LOCKED_BYTES:
        due = "at least 1 GiB, better unlimited: RDMA (InfiniBand, RoCE) locks the memory that it reads"
        remedy = f"{raised} LimitMEMLOCK of slurmd's unit"
        got = f"{report.locked_bytes >> 10} KiB"
        yield Finding(report.node, "ulimit -l", got, due, remedy, (report.node,))


def check_name(report: NodeReport, one_machine: bool) -> Iterator[Finding]:
    """Find a node whose own name does not lead to itself, at an address that the other nodes can reach."""
    if report.addresses is None:
        return
    wanted = "its own address, as the other nodes know it"
    remedy = f"Correct /etc/hosts or DNS for {report.node}, or name the network: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
    if not report.addresses:
        got = "a name that does not resolve"
    elif report.foreign_addresses:
        got = f"{', '.join(report.foreign_addresses)}, an address of another machine"
    elif not one_machine and all(address.startswith("127.") or address == "::1" for address in report.addresses):
        got = f"{', '.join(report.addresses)}, which no other node can reach"
    else:
        return
    yield Finding(report.node, "host name", got, wanted, remedy, (report.node,))


def check_shared_folder(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """Find nodes that do not see what another one wrote."""
    blind = [report for report in reports if not (report.sees_head and report.head_sees)]
    nobody = len(reports) > 2 and len(blind) == len(reports) - 1
    wanted, remedy = (
        "one folder that all nodes read and write",
        "Mount the shared file system on this node, or leave it out",
    )
    if nobody:
        remedy = "Give folders on the cluster's shared file system (--out, run.dir)"
    for report in blind:
        parts = [] if report.sees_head else ["it does not see what node 0 wrote"]
        parts += [] if report.head_sees else ["node 0 does not see what it wrote"]
        blamed = () if nobody else (report.node,)
        yield Finding(report.node, "shared folder", " and ".join(parts), wanted, remedy, blamed)


def check_disk(report: NodeReport, need: DiskNeed) -> Iterator[Finding]:
    """Find too little room for what the run will still write. No node is to blame, since all use the same disk."""
    if report.free_bytes is not None and report.free_bytes < need.total:
        got, wanted = f"{report.free_bytes / GIB:.1f} GiB free", f"{need.total / GIB:.1f} GiB ({need})"
        remedy = "Free some space, take another run.dir, or lower trainer.keep_checkpoints"
        yield Finding(report.node, "free disk", got, wanted, remedy)


def check_clocks(reports: Sequence[NodeReport], limit: float) -> Iterator[Finding]:
    """Find clocks that differ by more than `limit` seconds, less the error of measurement. Of two, none is to blame."""
    several = len(reports) > 2
    common = median_low(report.clock_ahead for report in reports) if several else 0.0
    remedy, others = "Start time synchronisation (chrony, ntpd) there", "the others" if several else "node 0"
    for report in reports:
        ahead = report.clock_ahead - common
        if abs(ahead) - report.clock_error > limit:
            got = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} {others}"
            blamed = (report.node,) if several else ()
            yield Finding(report.node, "clock", got, f"within {limit:g} s", remedy, blamed)
