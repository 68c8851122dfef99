"""A real Slurm cluster on this machine: one slurmctld and a slurmd per host, each in a network namespace."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hosts import Host, hosts, why_no_hosts

from srlm_mega.launch.child_process import die_with

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
PATIENCE = 120.0  # seconds for what takes a second or two on an idle machine
GPUS = 2  # fake ones, of each node
# MessageTimeout: the order to end a step that a busy node did not take in time is given again a minute later, and then
# ends the step of that number in the job's next attempt.
CONF = """\
ClusterName=test
SlurmctldHost=head
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
ReturnToService=0
SlurmctldTimeout=300
SlurmdTimeout=300
MessageTimeout=60
KillWait=10
GresTypes=gpu
NodeName={nodes} CPUs=2 RealMemory=2000 Features=ib Gres=gpu:h100:{gpus} State=UNKNOWN
PartitionName=debug Nodes={nodes} Default=YES MaxTime=60 State=UP
"""


@dataclass(frozen=True)
class Job:
    """What Slurm says about a job."""

    id: int
    state: str
    reason: str
    restarts: int
    nodes: str


@dataclass(frozen=True)
class Cluster:
    """A running cluster; `root` has its logs and the hosts' /etc/profile, `head` is where people type."""

    root: Path
    head: Host
    nodes: tuple[Host, ...]

    def environment(self) -> dict[str, str]:
        """Of the commands of a user who has just logged in."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "PYTHONPATH") if name in os.environ}
        return kept | {"OMP_NUM_THREADS": "1"}

    def run(self, *argv: str | Path, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """A command on the head."""
        return subprocess.run(
            self.head.command(argv), cwd=cwd, env=self.environment(), capture_output=True, text=True, check=False
        )

    def said(self, *argv: str | Path) -> str:
        """What a command printed; it must work."""
        done = self.run(*argv)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: int) -> Job:
        """Slurm's record of a job."""
        fields = dict(part.partition("=")[::2] for part in self.said("scontrol", "show", "job", str(number)).split())
        return Job(number, fields["JobState"], fields["Reason"], int(fields["Restarts"]), fields.get("NodeList", ""))

    def wait(self, what: str, until: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Poll until something is so."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s\n{self.trouble()}"
            time.sleep(0.2)

    def finished(self, number: int, seconds: float = PATIENCE) -> Job:
        """Wait for a job to end for good."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
        self.wait(f"the end of job {number}", lambda: self.job(number).state in over, seconds)
        return self.job(number)

    def trouble(self) -> str:
        """The ends of all logs, for a failed test."""
        queue = self.run("squeue").stdout + self.run("sinfo").stdout
        logs = [f"{path}:\n" + "\n".join(text(path).splitlines()[-15:]) for path in sorted(self.root.glob("*.log"))]
        return "\n".join([queue, *logs])


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def why_not() -> str | None:
    """Why there can be no cluster here."""
    missing = [name for name in NEEDED if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None]
    if missing:
        return f"no Slurm here: {', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    return why_no_hosts()


@contextmanager
def cluster(root: Path, names: Sequence[str]) -> Iterator[Cluster]:
    """Start it, wait until all nodes are idle, and stop it, whatever happened."""
    etc = root / "etc"
    etc.mkdir()
    (root / "state").mkdir()
    (etc / "slurm.conf").write_text(CONF.format(root=root, nodes=",".join(names), gpus=GPUS))
    (etc / "gres.conf").write_text(f"Name=gpu Type=h100 File={root}/gpu[0-{GPUS - 1}]\n")
    (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for number in range(GPUS):  # character devices, or Slurm sets no CUDA_VISIBLE_DEVICES
        subprocess.run(["mknod", str(root / f"gpu{number}"), "c", "1", "3"], check=True)
    (root / "profile").touch()  # whatever this machine's own says of modules
    with hosts(["head", *names], {"slurm": etc, "profile": root / "profile"}) as (head, *nodes):
        daemons = [munged(root)]
        try:
            daemons.append(daemon(head, root, "slurmctld", "-D"))
            for node in nodes:
                daemons.append(daemon(node, root, "slurmd", "-D", "-N", node.name))
            made = Cluster(root, head, tuple(nodes))
            made.wait("that all nodes are idle", lambda: all_idle(made))
            yield made
            made.run("scancel", "--user=root", "--full", "--signal=KILL")
        finally:
            for process in reversed(daemons):
                process.terminate()
            for process in reversed(daemons):
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def all_idle(made: Cluster) -> bool:
    return made.run("sinfo", "--noheader", "--Node", "--format=%t").stdout.split() == ["idle"] * len(made.nodes)


def munged(root: Path) -> "subprocess.Popen[bytes]":
    """Munge's daemon, with a key of its own."""
    key = root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    argv = ["munged", "--foreground", "--force", f"--socket={root}/munge.socket", f"--key-file={key}",
            f"--pid-file={root}/munged.pid", f"--log-file={root}/munged.log", f"--seed-file={root}/seed"]  # fmt: skip
    ends_too = partial(die_with, os.getpid())
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=ends_too)


def daemon(host: Host, root: Path, *argv: str) -> "subprocess.Popen[bytes]":
    """A daemon of Slurm on its host."""
    with (root / f"{argv[0]}.{host.name}.out.log").open("wb") as log:
        clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
        return subprocess.Popen(
            host.command(argv),
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=partial(die_with, os.getpid()),
        )
