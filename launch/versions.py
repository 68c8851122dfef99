"""versions.toml: the sets of versions that belong together."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet

FILE = Path(__file__).with_name("versions.toml")
Purpose = Literal["cpu", "training", "sampling"]


@dataclass(frozen=True)
class Package:
    """A package of a set. `needs` and `tested` are version ranges as pip writes them; empty ones take any version."""

    needs: str
    tested: str
    install: str
    optional: bool = False


@dataclass(frozen=True)
class VersionSet:
    """One environment. `source`: who tried it; `image`: the container to start from, empty where there is none."""

    source: str
    python: str
    packages: Mapping[str, Package]
    image: str = ""


def version_set(purpose: Purpose) -> VersionSet:
    """Read a set from the table."""
    table = tomllib.loads(FILE.read_text(encoding="utf-8"))[purpose]
    packages = {name: Package(**values) for name, values in table["packages"].items()}
    return VersionSet(table["source"], table["python"], packages, table.get("image", ""))


def fits(version: str, wanted: str) -> bool:
    """Tell whether a version is in a range. NVIDIA's images have builds such as 2.10.0a0, which count as 2.10."""
    return SpecifierSet(wanted).contains(version, prereleases=True)
