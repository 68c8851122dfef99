"""`srlm launch preflight` as a step of a real allocation: on nodes that are well, and with one that is not."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cluster import Cluster, text
from hosts import ETC
from places import ROOT

pytestmark = [pytest.mark.extra, pytest.mark.timing]
SRLM = Path(sys.executable).parent / "srlm"
CONFIG = [ROOT / "launch/configs/toy_cpu.yaml", "launch.nodes=2", "launch.processes_per_node=1"]
LIMITS = ["launch.preflight.report_seconds=100", "launch.preflight.allreduce_seconds=200"]  # for a busy machine
PORTS = (41_000, 41_002)
# Starts a command and holds, on node 0, the port that the nodes try first: whoever calls it gets no answer.
HOLDER = f"""
import os, socket, sys
from srlm_mega.launch.listening import ports_of
if os.environ["SLURM_PROCID"] == "0":
    holder = socket.create_server(("", ports_of(int(os.environ["SLURM_JOB_ID"]), {PORTS})[0]))
    holder.set_inheritable(True)
os.execv(sys.argv[1], sys.argv[1:])
"""


def preflight(
    slurm: Cluster, nodes: str, out: Path, *overrides: str, before: Sequence[str | Path] = ()
) -> tuple[int, str, str]:
    """Exit code, what it printed, and what it said is wrong."""
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", f"--nodelist={nodes}", "--cpu-bind=none"]
    command = [
        *before,
        SRLM,
        "launch",
        "preflight",
        *CONFIG,
        *LIMITS,
        *overrides,
        f"run.dir={out / 'run'}",
        "--out",
        out,
    ]
    done = slurm.run(*step, *command)
    return done.returncode, done.stdout, done.stderr


def test_nodes_that_are_well(slurm: Cluster, tmp_path: Path) -> None:
    """Although the port that they try first is another's on node 0."""
    held = [sys.executable, "-c", HOLDER]
    code, printed, wrong = preflight(slurm, "n1,n2", tmp_path, f"launch.port_range={list(PORTS)}", before=held)
    assert code == 0, wrong + text(tmp_path / "n1.log") + text(tmp_path / "n2.log")
    assert "PP: 1 x 2 ranks" in printed and "2 nodes are well" in printed
    assert "10.99.0.2" in printed and "10.99.0.3" in printed
    assert not (tmp_path / "bad_nodes").exists()


def test_a_node_whose_name_leads_nowhere(slurm: Cluster, tmp_path: Path) -> None:
    """As Debian's installer writes it: the own name at 127.0.1.1. gloo would listen there, and the others wait."""
    host = next(node for node in slurm.nodes if node.name == "n3")
    file = ETC / host.namespace / "hosts"
    before = file.read_text()
    file.write_text(before.replace(f"{host.address} n3", "127.0.1.1 n3"))
    try:
        code, printed, wrong = preflight(slurm, "n2,n3", tmp_path)
    finally:
        file.write_text(before)
    assert code == 2, printed + wrong
    assert "n3: host name: got 127.0.1.1, which no other node can reach, wanted its own address" in wrong
    assert text(tmp_path / "bad_nodes") == "n3\n"


def test_a_node_that_is_never_there(slurm: Cluster, tmp_path: Path) -> None:
    """Its task ends before it reports."""
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", "--nodelist=n1,n2", "--cpu-bind=none", "--wait=0"]
    short = "launch.preflight.report_seconds=5"
    command = [SRLM, "launch", "preflight", *CONFIG, short, f"run.dir={tmp_path / 'run'}", "--out", tmp_path]
    done = slurm.run(*step, "sh", "-c", 'test "$SLURMD_NODENAME" = n2 && exit 0; exec "$@"', "sh", *command)
    assert done.returncode == 2
    assert "n2: report: got none in 5 s, wanted one from each node" in done.stderr
    assert text(tmp_path / "bad_nodes") == "n2\n"
