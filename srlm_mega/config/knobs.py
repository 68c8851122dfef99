"""Every knob of a configuration by its dotted key, with its default."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic_core import PydanticUndefined, to_jsonable_python

from srlm_mega.config import Config
from srlm_mega.config.section import Section


@dataclass(frozen=True)
class Knob:
    """One value of a configuration. `default` is as JSON has it, None where the value must be given.
    `optional_sections` are the sections around it that may be absent, outermost first."""

    key: str
    default: Any
    optional_sections: tuple[str, ...]


@cache
def knobs() -> Mapping[str, Knob]:
    """Every knob by its dotted key, in the order of the sections."""
    return {knob.key: knob for knob in knobs_of(Config, {}, "", ())}


def knobs_of(
    section: type[Section], given: Mapping[str, Any], prefix: str, optional: tuple[str, ...]
) -> Iterator[Knob]:
    """The knobs of a section and of those inside it. `given` has the defaults that the section around it sets."""
    for name, field in section.model_fields.items():
        key, default = f"{prefix}{name}", given.get(name, field.default)
        inner = next((kind for kind in (field.annotation, *get_args(field.annotation)) if is_section(kind)), None)
        if inner is None:
            yield Knob(key, None if default is PydanticUndefined else to_jsonable_python(default), optional)
        else:
            around = optional if inner is field.annotation else (*optional, key)
            yield from knobs_of(inner, dict(default) if isinstance(default, Section) else {}, f"{key}.", around)


def is_section(kind: object) -> bool:
    """Tell sections from other types of fields."""
    return isinstance(kind, type) and issubclass(kind, Section)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found
