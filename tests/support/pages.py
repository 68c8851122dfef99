"""Fenced blocks of the pages in docs/, so that tests can run what people copy."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from places import ROOT

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"`([\w.]+\.\w+)`:?$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the file it is to be saved as. The rule: a file's name in backticks
    ends the last line of text above its block."""

    language: str
    text: str
    file: str | None


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, given by its path in the project, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        above = text[: match.start()].rstrip().rpartition("\n")[2]
        named = FILE_NAME.search(above)
        found.append(Block(match[1], match[2], named[1] if named else None))
    return found


def run_block(block: Block, folder: Path) -> str:
    """Save a named block in `folder`, or run a `sh` block there, with `srlm` and `python` of this environment; what it
    printed. AssertionError when a command of it fails."""
    if block.file is not None:
        (folder / block.file).write_text(block.text, encoding="utf-8")
        return ""
    assert block.language == "sh", f"a block of {block.language} without a file name above it:\n{block.text}"
    script = f'export PATH="{Path(sys.executable).parent}:$PATH" OMP_NUM_THREADS=1\n{block.text}'
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{block.text}\nended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout
