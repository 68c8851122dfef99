"""Every knob of a configuration by its dotted key: its default, and what it decides."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from srlm_mega.config import Config
from srlm_mega.config.section import Decides, Decision, Section, section_in


@dataclass(frozen=True)
class Knob:
    """One value of a configuration. `default` is in JSON's form, None where the value must be given.
    `optional_sections` are the sections around it that may be absent, outermost first."""

    key: str
    default: Any
    decides: Decides
    description: str | None
    optional_sections: tuple[str, ...]


@cache
def knobs() -> Mapping[str, Knob]:
    """Return every knob by its dotted key, in the order of the sections."""
    return {knob.key: knob for knob in knobs_of(Config, {}, "", ())}


def knobs_of(
    section: type[Section], given: Mapping[str, Any], prefix: str, optional: tuple[str, ...]
) -> Iterator[Knob]:
    """Yield the knobs of a section and of those inside it. `given` has the defaults that the section around it sets."""
    for name, field in section.model_fields.items():
        key, default = f"{prefix}{name}", given.get(name, field.default)
        inner = section_in(field)
        if inner is None:
            value = None if default is PydanticUndefined else to_jsonable_python(default)
            yield Knob(key, value, section.decision(field), field.description, optional)
        else:
            around = optional if inner is field.annotation else (*optional, key)
            yield from knobs_of(inner, dict(default) if isinstance(default, Section) else {}, f"{key}.", around)


def deciding(*decisions: Decision) -> frozenset[str]:
    """Return the keys of the knobs that decide one of these."""
    return frozenset(key for key, knob in knobs().items() if knob.decides.what in decisions)


def by_round() -> frozenset[str]:
    """Return the keys of the knobs of which a further round may have another value."""
    return frozenset(key for key, knob in knobs().items() if knob.decides.by_round)


def keys_of(section: str, part: str | None) -> tuple[str, ...]:
    """Return the keys of a section's knobs that belong to this part of it, or (None) to no part."""
    return tuple(key for key, knob in knobs().items() if key.startswith(f"{section}.") and knob.decides.part == part)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found
