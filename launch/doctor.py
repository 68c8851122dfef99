"""Run the probes, each in a process of its own with a time limit, so that a broken part breaks only its probe; and turn
their answers into a table with a remedy for everything that is wrong."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from srlm_mega.config.runtime import SamplerBackend
from srlm_mega.launch.child_process import die_with, ending_children
from srlm_mega.launch.probe import MODULES, ProbeAnswer

SCRIPT = Path(__file__).with_name("probe.py")
FILE = Path(__file__).with_name("versions.toml")  # the sets of versions that belong together
AT_ONCE = 4
Purpose = Literal["cpu", "training", "sampling"]
Status = Literal["ok", "untested", "bad", "absent", "not asked"]
APEX = (
    "pip uninstall apex: this one is PyPI's, a toolkit for web sites. NVIDIA's is optional and comes with its PyTorch "
    "images or is built from github.com/NVIDIA/apex"
)
LIBCUDA = (
    "libcuda.so.1 comes with NVIDIA's driver, not with pip: install the driver on this machine; in a container, give "
    "it the GPUs (docker run --gpus all)"
)
SLURM = "work on a login or compute node of the cluster; ask its administrator why `scontrol ping` does not answer"
HUNG = "see where it hangs: timeout -s ABRT 60 python -X faulthandler -c 'import {module}'; a slow disk: --timeout"


@dataclass(frozen=True)
class Package:
    """A package of a set. `needs` and `tested` are version ranges as pip writes them; empty ones take any version."""

    needs: str
    tested: str
    install: str
    optional: bool = False


@dataclass(frozen=True)
class VersionSet:
    """One environment. `source`: who tried it; `backends`: samplers that it is for; `image`: the container to start
    from, empty where there is none."""

    name: str
    source: str
    backends: tuple[str, ...]
    python: str
    packages: Mapping[str, Package]
    image: str = ""


@dataclass(frozen=True)
class Probed:
    """The outcome of a probe: an answer, or a failure in words."""

    name: str
    answer: ProbeAnswer | None
    failure: str = ""


@dataclass(frozen=True)
class DoctorRow:
    """One part of the environment. `remedy` is empty when there is nothing to do."""

    name: str
    status: Status
    found: str
    wanted: str
    remedy: str = ""


@dataclass(frozen=True)
class PartInUse:
    """A part of the environment by its name, whether a configuration uses it on this machine, and for what, or why not.
    `refused`: it would be needed and cannot be used."""

    name: str
    use: Literal["used", "not used", "refused"]
    why: str


def version_set(name: str) -> VersionSet:
    """Read a set from the table."""
    table = tomllib.loads(FILE.read_text(encoding="utf-8"))[name]
    packages = {package: Package(**values) for package, values in table["packages"].items()}
    return VersionSet(
        name, table["source"], tuple(table["backends"]), table["python"], packages, table.get("image", "")
    )


def version_sets(purpose: Purpose, backend: SamplerBackend | None) -> list[VersionSet]:
    """Return the sets for a purpose; for sampling, those of a backend (None: of any that is not the trainer's own)."""
    sets = [version_set(name) for name in tomllib.loads(FILE.read_text(encoding="utf-8"))]
    if purpose == "sampling" and backend is not None:
        return [one for one in sets if backend in one.backends]
    return [one for one in sets if one.name.partition("_")[0] == purpose]


def best_fit(
    probed: Sequence["Probed"], sets: Sequence[VersionSet], under_slurm: bool
) -> tuple[VersionSet, list["DoctorRow"]]:
    """Return the set with the fewest parts that are wrong here, the first of equal ones, and its rows."""
    tried = [(one, diagnose(probed, one, under_slurm)) for one in sets]
    return min(tried, key=lambda pair: sum(row.status == "bad" for row in pair[1]))


def fits(version: str, wanted: str) -> bool:
    """Tell whether a version is in a range. NVIDIA's images have builds such as 2.10.0a0, which count as 2.10."""
    return SpecifierSet(wanted).contains(version, prereleases=True)


def run_probes(names: Sequence[str], seconds: float) -> list[Probed]:
    """Run probes, a few at a time since each may import torch; `seconds` limits each."""
    with ThreadPoolExecutor(AT_ONCE) as pool, ending_children():
        return list(pool.map(lambda name: run_probe(name, seconds), names))


def run_probe(name: str, seconds: float, python: str = sys.executable) -> Probed:
    """Run one probe by this Python, or another one, for at most `seconds`."""
    try:
        said = run_alone([python, "-P", str(SCRIPT), name], seconds)  # -P: its folder is not searched for packages
    except NoAnswer as reason:
        return Probed(name, None, str(reason))
    return Probed(name, ProbeAnswer(**json.loads(said)))


class NoAnswer(Exception):
    """The reason why a process gave no answer."""


def run_alone(argv: Sequence[str], seconds: float) -> str:
    """Run a process that may hang or crash, for at most `seconds`; return the last line that it prints. NoAnswer when
    it fails."""
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=partial(die_with, os.getpid()),
        )
    except OSError as error:
        raise NoAnswer(f"cannot be started ({error.strerror})") from None
    try:
        said, wrong = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise NoAnswer(f"no answer in {seconds:g} s") from None
    if process.returncode < 0:
        raise NoAnswer(f"ended by {signal.Signals(-process.returncode).name}")
    if process.returncode:
        lines = [line for line in wrong.splitlines() if line.strip()]
        raise NoAnswer(lines[-1].strip() if lines else f"ended with {process.returncode}, nothing said")
    return said.splitlines()[-1]


def diagnose(probed: Sequence[Probed], chosen: VersionSet, under_slurm: bool) -> list[DoctorRow]:
    """Return a row for each probe. Bad: a part is needed and absent, or there and broken."""
    found = {one.name: one.answer for one in probed if one.answer is not None and not one.answer.absent}
    python = Package(chosen.python, chosen.python, f"make a virtual environment with Python {chosen.python}")
    packages = {"python": python, **chosen.packages}
    rows = []
    for one in probed:
        if under_slurm and one.name == "slurm" and (one.answer is None or "UP" not in one.answer.detail):
            rows.append(DoctorRow(one.name, "bad", said(one), "srun, sbatch and a controller that answers", SLURM))
        elif one.name in packages:
            rows.append(row(one, packages[one.name], found, "cuda" in packages))
        else:
            rows.append(DoctorRow(one.name, "not asked", said(one), ""))
    return rows


def row(one: Probed, package: Package, found: Mapping[str, ProbeAnswer], on_gpus: bool) -> DoctorRow:
    """Judge a part that the version set has; `found` are all parts that are there."""
    wanted = package.tested or package.needs or "any"
    answer = one.answer
    if answer is None:
        return DoctorRow(one.name, "bad", one.failure, wanted, remedy_of_failure(one, package))
    if answer.stranger:
        return DoctorRow(one.name, "bad", f"{answer.version}, another project's", "NVIDIA's, or none", APEX)
    if answer.absent:
        status: Status = "absent" if package.optional else "bad"
        return DoctorRow(one.name, status, said(one), wanted, "" if package.optional else package.install)
    if not fits(answer.version, package.needs):
        return DoctorRow(one.name, "bad", said(one), package.needs, package.install)
    clash = clash_with_torch(one.name, answer.version, found.get("torch"), on_gpus)
    if clash is not None:
        return DoctorRow(one.name, "bad", said(one), *clash)
    if not fits(answer.version, package.tested):
        return DoctorRow(one.name, "untested", said(one), wanted, f"may work; tested: {package.install}")
    return DoctorRow(one.name, "ok", said(one), wanted)


def clash_with_torch(name: str, version: str, torch: ProbeAnswer | None, on_gpus: bool) -> tuple[str, str] | None:
    """Return what torch wants of another part, and the remedy; None when it has that."""
    if torch is None:
        return None
    if name == "triton" and torch.triton:
        wanted = str(Requirement(torch.triton).specifier)
        if not fits(version, wanted):
            return f"{wanted}, by torch {torch.version}", f"pip install 'triton{wanted}'"
    if name == "torch" and on_gpus and not torch.cuda:
        return "a CUDA build", "take PyTorch's CUDA build, or the image"
    if name == "cuda" and torch.cuda and int(version.partition(".")[0]) < int(torch.cuda.partition(".")[0]):
        return (
            f"CUDA {torch.cuda}, by torch {torch.version}",
            f"bring NVIDIA's driver up to date, or take a torch for CUDA {version.partition('.')[0]}",
        )
    return None


def remedy_of_failure(one: Probed, package: Package) -> str:
    """Choose a remedy by the last line of a traceback."""
    failure = one.failure
    if "libcuda.so" in failure:
        return LIBCUDA
    if "No module named" in failure:
        missing = failure.rpartition("No module named ")[2].strip("'\" ").partition(".")[0]
        _, own = MODULES.get(one.name, ("", ""))
        return package.install if missing == own.partition(".")[0] else f"pip install {missing}, which {one.name} needs"
    if "undefined symbol" in failure or "ended by SIG" in failure:
        return f"its compiled part does not fit this torch or machine: {package.install}"
    if failure.startswith("no answer"):
        return HUNG.format(module=one.name.replace("-", "_"))
    return package.install


def said(one: Probed) -> str:
    """Return a part's version and detail, or the reason why there is none."""
    if one.answer is None:
        return one.failure
    version = "absent" if one.answer.absent else one.answer.version
    detail = one.answer.detail if not one.answer.detail.startswith("/") else ""
    return f"{version} ({detail})" if detail else version


def is_well(rows: Sequence[DoctorRow]) -> bool:
    """Tell whether everything that is needed is there and works."""
    return all(row.status != "bad" for row in rows)
