"""Provenance of a run: versions, commit, command, machine."""

import importlib.metadata
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import orjson

from srlm_mega.text import visible

PACKAGES = ("srlm-mega", "torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")


def provenance() -> bytes:
    """Return versions, commit, command, date and machine as a JSON object."""
    facts = {
        "command": list(map(visible, sys.argv)),  # file names need not be UTF-8, and JSON must
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: package_version(name) for name in PACKAGES},
    }
    return orjson.dumps(facts, option=orjson.OPT_INDENT_2)


def package_version(name: str) -> str | None:
    """Return the installed version of a distribution, None when it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the checkout's commit, with `+changes` when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    argv = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
    try:
        answer = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
