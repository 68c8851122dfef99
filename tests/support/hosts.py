"""Hosts on one machine: each is a network namespace and a name of its own, on one bridge. Needs root."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ETC = Path("/etc/netns")  # `ip netns exec NAME` shows a process ETC/NAME/hosts as /etc/hosts


@dataclass(frozen=True)
class Host:
    """One of them. `namespace` is the name that `ip netns` knows."""

    name: str
    address: str
    namespace: str

    def command(self, argv: Sequence[str | Path]) -> list[str]:
        """The argv that runs a command on this host, under its host name."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.namespace, *named, *map(str, argv)]

    def link(self, state: str) -> None:
        """Cut its cable (`down`) or mend it (`up`)."""
        ip("-n", self.namespace, "link", "set", "eth0", state)


def why_no_hosts() -> str | None:
    """Why there can be none here."""
    missing = [name for name in ("ip", "unshare") if shutil.which(name, path=f"{os.environ['PATH']}:/sbin") is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install iproute2 util-linux)"
    if os.geteuid():
        return "network namespaces need root"
    probe = f"srlm-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else None


def skip_without_hosts() -> None:
    """Skip the test, with the reason, where there can be none."""
    reason = why_no_hosts()
    if reason is not None:
        pytest.skip(reason)


def ip(*arguments: str) -> None:
    """The `ip` command; RuntimeError with what it said."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextmanager
def hosts(names: Sequence[str], files: Mapping[str, Path] | None = None) -> Iterator[list[Host]]:
    """Hosts that see each other and nothing else. `files`: what they see in /etc under these names."""
    sweep()
    prefix = f"srlm-{os.getpid()}-"
    made = [Host(name, f"10.99.0.{number + 1}", prefix + name) for number, name in enumerate(names)]
    switch = prefix + "switch"
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for number, host in enumerate(made):
            write_etc(host, made, files or {})
            ip("netns", "add", host.namespace)
            ip("link", "add", "eth0", "netns", host.namespace, "type", "veth", "peer", "name", f"port{number}",
               "netns", switch)  # fmt: skip
            ip("-n", switch, "link", "set", f"port{number}", "master", "br0", "up")
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host.namespace, "link", "set", device, "up")
        yield made
    finally:
        remove(prefix)


def write_etc(host: Host, all_hosts: Sequence[Host], files: Mapping[str, Path]) -> None:
    """What a host sees in /etc."""
    folder = ETC / host.namespace
    folder.mkdir(parents=True)
    lines = ["127.0.0.1 localhost", *(f"{other.address} {other.name}" for other in all_hosts)]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "resolv.conf").write_text("")
    for name, path in files.items():
        (folder / name).symlink_to(path)


def remove(prefix: str) -> None:
    """Take away all namespaces whose names begin so, with the processes in them."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for name in [line.split()[0] for line in listed.splitlines() if line.startswith(prefix)]:
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
        for pid in map(int, pids.split()):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    for folder in ETC.glob(f"{prefix}*"):
        shutil.rmtree(folder)


def sweep() -> None:
    """What a killed test left."""
    left = {path.name for path in ETC.glob("srlm-*")}
    for pid in {name.split("-")[1] for name in left}:
        if not Path("/proc", pid).exists():
            remove(f"srlm-{pid}-")
