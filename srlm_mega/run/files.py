"""Writing and removing files so that a kill leaves nothing that looks whole."""

import os
import shutil
from pathlib import Path


def remove_folder(path: Path, renamed: Path) -> None:
    """Rename a folder and remove it, so that a kill in between leaves nothing that looks whole."""
    shutil.rmtree(renamed, ignore_errors=True)  # left by a removal that was killed
    os.rename(path, renamed)
    shutil.rmtree(renamed)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a small file so that readers see the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")  # process ids repeat on other nodes
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def fsync(path: Path) -> None:
    """Make a file or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
