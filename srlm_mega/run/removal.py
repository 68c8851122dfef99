"""What --redo would remove: outputs with all that was made from them, their records, and the work that they took."""

import glob
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from srlm_mega.run.manifest import MANIFEST
from srlm_mega.text import duration

NAMED = 4  # outputs that are named, of many


def manifests_in(root: Path) -> dict[str, Mapping[str, Any]]:
    """Return the content of every manifest in a run's folder that can be read, by the stage's name, oldest first."""
    found: dict[str, Mapping[str, Any]] = {}
    # The module's, which passes over a folder that goes away while it looks; pathlib's raises an error then.
    listed = [*glob.glob(f"*/{MANIFEST}", root_dir=root), *glob.glob(f"*/*/{MANIFEST}", root_dir=root)]
    # Those of a stage that commits at this moment have another name as soon as they are found.
    finished = [root / path for path in listed if ".partial" not in path and ".removed" not in path]
    for path in sorted(finished, key=lambda path: path.stat().st_mtime_ns):
        try:
            content = orjson.loads(path.read_bytes())
        except (orjson.JSONDecodeError, OSError):
            continue  # one that is damaged may be what is to be made again
        found[str(path.parent.relative_to(root))] = content if isinstance(content, dict) else {}
    return found


def made_from(found: Mapping[str, Mapping[str, Any]], names: Collection[str]) -> list[str]:
    """Return the outputs of these names, and all that were made from them or lie in them."""
    doomed: set[str] = set()
    more = {name for name in found if name in names}
    while more - doomed:
        doomed |= more
        more = {
            name
            for name, fields in found.items()
            if not doomed.isdisjoint(inputs_in(fields)) or name.rpartition("/")[0] in doomed
        }
    return [name for name in found if name in doomed]


def inputs_in(fields: Mapping[str, Any]) -> Iterable[str]:
    """Return the names of a manifest's inputs, none where it is damaged."""
    inputs = fields.get("inputs")
    return inputs if isinstance(inputs, dict) else ()


def told(root: Path, names: Iterable[str]) -> str:
    """Return in words what the removal of these outputs of a run removes: how many, which, records, hours of work, and
    what is half done."""
    found = manifests_in(root)
    outputs = [name for name in found if name in set(names)]
    rows, seconds = (sum(number(found[name].get(key)) for name in outputs) for key in ("rows", "seconds"))
    halves = sorted(name for name in set(names) if (root / f"{name}.partial").is_dir())
    listed = ", ".join(outputs[:NAMED]) + (f" and {len(outputs) - NAMED} more" if len(outputs) > NAMED else "")
    count = f"{len(outputs)} output{'' if len(outputs) == 1 else 's'} ({listed})" if outputs else ""
    facts = [count, f"{rows:,.0f} rows", f"{duration(seconds)} of work"] if outputs else []
    return ", ".join(facts + [f"what {name} has done so far" for name in halves]) or "nothing that is finished"


def number(value: object) -> float:
    """Return a manifest's number, 0 for what is none."""
    return float(value) if isinstance(value, int | float) else 0.0
