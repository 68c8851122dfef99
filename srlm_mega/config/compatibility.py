"""Files of older versions, read by this one: options that were added, renamed or removed since."""

import os
import sys
from collections.abc import Container, Mapping
from functools import cache
from typing import Any

from srlm_mega.config.knobs import deciding, flat, knobs
from srlm_mega.config.runtime import default_shard_size
from srlm_mega.text import on_one_screen

# Former name -> today's. Files, overrides and finished outputs may have either.
RENAMED = {
    f"runtime.sampler.{key}": f"sampler.{key}"
    for key in ("python", "container", "mounts", "num_devices", "devices_per_node", "slurm", "take_over_seconds")
}
FORMER_SECTIONS = frozenset(old.rpartition(".")[0] for old in RENAMED)
# Ends a key under which an output records the hash of the file that the key without it names.
CONTENT = " xxh3_128"
# A knob that is gone -> its last default, as JSON. With that value it is ignored, any other is refused.
REMOVED: dict[str, Any] = {}


def changed(old: Mapping[str, Any], new: Mapping[str, Any], ignored: Container[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, with both values. A key that one side does not know has its default there.
    Two paths of the same file, or of files with the same content, are the same value. Keys in `ignored`, and those that
    decide no output any more, may differ."""
    old = {RENAMED.get(key, key): value for key, value in old.items()}
    free = deciding("limit", "reach", "nothing")
    known = sorted(key for key in old.keys() | new.keys() if not key.endswith(CONTENT))
    keys = [key for key in known if key not in ignored and key not in free]
    both = {key: (recorded(key, old), recorded(key, new)) for key in keys}
    return {
        key: (before, after)
        for key, (before, after) in both.items()
        if before != after and not same_file(key, old, new)
    }


def same_file(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Tell whether two values are paths of files with the same content or, where that is not known, of one file."""
    before, after = old.get(key + CONTENT), new.get(key + CONTENT)
    if before is not None and after is not None:
        return bool(before == after)
    one, other = old.get(key), new.get(key)
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def edited(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that name the same path in both, of a file whose content is another now, with the path."""
    files = {key: key + CONTENT for key in old if key + CONTENT in old and key + CONTENT in new}
    return {key: new[key] for key, file in files.items() if old[key] == new.get(key) and old[file] != new[file]}


def listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Return changed keys with both values, each on a line of its own."""
    return "".join(f"\n  - {key}: was {old!r}, now {new!r}" for key, (old, new) in changes.items())


def recorded(key: str, values: Mapping[str, Any]) -> Any:
    """Return a key's value among these, else its default; None inside a section that is absent there."""
    if key == "sampler.shard_size" and values.get(key) is None:
        return default_shard_size(values.get("sampler.backend", "huggingface"))  # older versions recorded the number
    if key in values or key in REMOVED:
        return values.get(key, REMOVED.get(key))
    if key not in knobs():
        return None
    if key == "model.chat_template" and values.get("model.path") is not None:
        return "llama2"  # the only one there was
    sections = [f"{section}." for section in knobs()[key].optional_sections]
    if not all(any(known.startswith(section) for known in values) for section in sections):
        return None
    return knobs()[key].default


def rename_old_keys(raw: dict[str, Any], source: str) -> None:
    """Rename the keys of a configuration to their present names, in place, and print so once; drop removed keys that
    have their last default. A key left under an old name is an error, for which `former` has the words."""
    given = flat(raw)
    rename(raw, {old: new for old, new in RENAMED.items() if old in given and new not in given}, source)
    for key, default in REMOVED.items():
        if key in given and given[key] == default:
            take(raw, key)
    for section in FORMER_SECTIONS:
        outer, _, name = section.rpartition(".")
        if isinstance(raw.get(outer), dict) and raw[outer].get(name) == {}:
            take(raw, section)


def rename(raw: dict[str, Any], names: Mapping[str, str], source: str) -> None:
    """Move values to other keys, in place, and print so once."""
    for old, new in names.items():
        put(raw, new, take(raw, old))
    if names:
        print_once(f"{source}: " + ", ".join(f"{old} is now {new}" for old, new in names.items()))


def prefer_override(merged: dict[str, Any], key: str, override: str) -> None:
    """Let an override that has just been put into `merged`, under old or present names, win over the file's value
    under the other name. `key` is the override's: a knob's, or a section's."""
    given = flat(merged)
    mine = [name for name in given if name == key or name.startswith(f"{key}.")]
    rename(merged, {name: RENAMED[name] for name in mine if name in RENAMED}, f"override {override!r}")
    for old, new in RENAMED.items():
        if new in mine and old in given:
            take(merged, old)


def former(key: str, value: Any) -> list[str]:
    """Return messages about an unknown key, or an unknown section's keys, that older versions knew."""
    given = flat({key: value})
    renamed = [
        f"{old} is now {RENAMED[old]}, which is given too: remove one of them" for old in given if old in RENAMED
    ]
    removed = [
        f"{old} was removed, and srlm now behaves as with {REMOVED[old]!r}: remove the key; got {given[old]!r}"
        for old in given
        if old in REMOVED
    ]
    return renamed + removed


def unknown(key: str, value: Any) -> list[str]:
    """Return the unknown keys that no version knew: the key itself or, of a section of older versions, those in it."""
    inside = flat(value, f"{key}.") if key in FORMER_SECTIONS and isinstance(value, dict) else {key: value}
    return [name for name in inside if name not in RENAMED and not former(name, inside[name])]


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by its dotted key, in sections that are made where missing. Where something else is in a section's
    place, nothing happens: validation reports it."""
    *sections, name = key.split(".")
    target: Any = values
    for section in sections:
        if isinstance(target, dict) and target.get(section) is None:
            target[section] = {}
        target = target[section] if isinstance(target, dict) else target
    if isinstance(target, dict):
        target[name] = value


def take(values: dict[str, Any], key: str) -> Any:
    """Remove and return a value by its dotted key, and remove sections that are empty then."""
    section, _, rest = key.partition(".")
    if not rest:
        return values.pop(section)
    value = take(values[section], rest)
    if not values[section]:
        del values[section]
    return value


@cache
def print_once(line: str) -> None:
    """Print a line to stderr, once per process."""
    print(on_one_screen(line), file=sys.stderr)
