"""Transformer Engine's Python without its compiled part: a wheel of 1 MB, put into build/ once for each version."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

ENDS = ("2.9.0", "2.11.0")  # of what megatron-core 0.16.1 asks for
NEWEST = "2.20.2"


def engine_packages(version: str) -> Path:
    """The folder to put on PYTHONPATH; one of several processes makes it. Skip where pip cannot."""
    name = f"transformer_engine=={version}"
    folder = ROOT / "build" / name.replace("==", "-")
    folder.parent.mkdir(exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / f"transformer_engine-{version}.dist-info/RECORD").is_file():
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
            done = subprocess.run([*pip, "--target", str(folder), name], capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"no package {name} to be installed: {done.stderr.strip()[-200:]}")
    return folder
