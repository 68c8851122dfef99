"""What listens on a node: the stores and the ranks' connections only where they are called."""

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from places import TOY

from srlm_mega.config.file import load_config
from srlm_mega.launch.child_process import environment, srlm_command
from srlm_mega.launch.ranks import Rendezvous, ranks_on_node, start_ranks
from srlm_mega.run.run_dir import RunDir

RANK = """
import os, sys, psutil, orjson, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
if dist.get_rank() == 0:
    agent = psutil.Process().parent()
    found = [one.laddr.ip for process in (agent, *agent.children(recursive=True))
             for one in process.net_connections() if one.status == psutil.CONN_LISTEN]
    open(sys.argv[1], "wb").write(orjson.dumps([total.item(), found, 
                os.environ["SRLM_PARENT_PID"] == str(agent.pid) and "TORCHELASTIC_RUN_ID" in os.environ]))
dist.barrier()
"""


@pytest.mark.timing
@pytest.mark.parametrize(
    "road", ["torchrun", *(pytest.param(road, marks=pytest.mark.extra) for road in ("a step of one node", "c10d"))]
)
def test_on_one_node_nothing_can_be_called_from_outside(road: str, tmp_path: Path) -> None:
    """Two stores with --standalone and c10d, one with static, and a socket of each rank."""
    config = load_config(TOY, ["launch.processes_per_node=2"])
    rank = [sys.executable, "-c", RANK, str(tmp_path / "found.json")]
    launch = config.launch.model_copy(update={"rendezvous": "c10d" if road == "c10d" else "static"})
    here = Rendezvous("127.0.0.1", 10_000 + os.getpid() % 20_000, "0")
    argv = ranks_on_node(srlm_command(), rank, launch, here, 0)
    if road == "torchrun":
        start = start_ranks(config, RunDir(tmp_path), "M1", [], tmp_path).argv
        argv = [*start[: start.index("--no-python") + 1], *rank]
    inherited = {name: value for name, value in os.environ.items() if "SOCKET_IFNAME" not in name}
    done = subprocess.run(argv, env=environment(inherited, 1, cpu=True, one_node=True), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, listening, knows_the_agent = orjson.loads((tmp_path / "found.json").read_bytes())
    assert total == 2 and knows_the_agent and set(listening) == {"127.0.0.1"}
    assert len(listening) == (3 if road == "a step of one node" else 4)
