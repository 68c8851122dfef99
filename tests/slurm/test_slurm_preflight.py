"""`srlm launch preflight` as a step of a real allocation with a node that is not well; a whole round has one of nodes
that are (test_slurm_jobs.py)."""

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


def preflight(slurm: Cluster, nodes: str, out: Path, *arguments: str, before: Sequence[str] = ()) -> tuple[int, str]:
    """Exit code and what it printed."""
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", f"--nodelist={nodes}", "--cpu-bind=none", *before]
    done = slurm.run(*step, SRLM, "launch", "preflight", *CONFIG, *arguments, f"run.dir={out}/run", "--out", out)
    return done.returncode, done.stdout + done.stderr


def test_a_node_whose_name_leads_nowhere(slurm: Cluster, tmp_path: Path) -> None:
    """As Debian's installer writes it: the own name at 127.0.1.1. gloo would listen there, and the others wait."""
    host = next(node for node in slurm.nodes if node.name == "n3")
    file = ETC / host.namespace / "hosts"
    before = file.read_text()
    file.write_text(before.replace(f"{host.address} n3", "127.0.1.1 n3"))
    try:
        code, printed = preflight(slurm, "n2,n3", tmp_path, "launch.preflight.report_seconds=100")  # a busy machine
    finally:
        file.write_text(before)
    assert code == 2, printed
    assert "n3: host name: got 127.0.1.1, which no other node can reach, wanted its own address" in printed
    assert text(tmp_path / "bad_nodes") == "n3\n"


def test_a_node_that_is_never_there(slurm: Cluster, tmp_path: Path) -> None:
    """Its task ends before it reports."""
    ends = ["--wait=0", "sh", "-c", 'test "$SLURMD_NODENAME" = n2 && exit 0; exec "$@"', "sh"]
    code, printed = preflight(slurm, "n1,n2", tmp_path, "launch.preflight.report_seconds=1", before=ends)
    assert code == 2 and "n2: report: got none in 1 s, wanted one from each node" in printed, printed
    assert text(tmp_path / "bad_nodes") == "n2\n"
