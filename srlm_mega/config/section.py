"""The base of all sections of a configuration, and the mark by which a knob says what it decides."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Unpack, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from srlm_mega.config.secrets_in_values import EXPORT, has_credentials

# output: the bytes of a stage's output; a finished stage and a half-done one must still have the same value.
# layout: where and how training runs, which changes its result by rounding only. Recorded and, in training, not
#   compared; in a stage that samples, compared.
# limit: when a run stops, which changes nothing that it makes. Recorded, never compared.
# reach: the way to an external judge, whose judgements do not depend on it. Recorded, never compared.
# nothing: no output depends on it. Neither recorded nor compared.
Decision = Literal["output", "layout", "limit", "reach", "nothing"]


@dataclass(frozen=True)
class Decides:
    """The mark of a knob that decides something else than its section says: `Annotated[int, Decides("limit")]`. `part`
    names the knobs of a section that some stages read alone. `by_round`: a further round may have another value than
    the finished ones, which keep theirs."""

    what: Decision
    part: str | None = None
    by_round: bool = False


def show_decisions(schema: dict[str, Any], section: "type[Section]") -> None:
    """Add `decides` to every knob in a section's JSON Schema."""
    for name, field in section.model_fields.items():
        if section_in(field) is None:
            schema["properties"][name]["decides"] = section.decision(field).what


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused. `decides` holds for every knob that says no other."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        json_schema_extra=show_decisions,  # type: ignore[typeddict-item]
    )
    own: ClassVar[Decides]

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """A value that is not true or false, which Python takes for 1 and 0, unless the knob is."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError(f"this is not true or false, got {value}")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _in_64_bits(cls, value: Any) -> Any:
        """A number that JSON can hold."""
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("the number has more than 64 bits")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _in_the_home_folder(cls, value: Any) -> Any:
        """A path in the home folder, which no shell has put in place of `~` in `run.dir=~/runs`, nor in a file."""
        if isinstance(value, tuple):
            return tuple(map(cls._in_the_home_folder, value))
        if not isinstance(value, Path) or not str(value).startswith("~"):
            return value
        try:
            return value.expanduser()
        except RuntimeError:
            raise ValueError(f"there is no home folder for {value.parts[0]}: give an absolute path") from None

    @model_validator(mode="after")
    def _shows_no_credentials(self) -> Self:
        """No value that is a URI with credentials, whatever it is for: a run keeps its configuration and shows it."""
        for name, value in self:
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, str | Path) and has_credentials(str(one)):
                    raise ValueError(f"{name} is a URI with credentials, and the run keeps its configuration: {EXPORT}")
        return self

    def __init_subclass__(cls, decides: Decision, **settings: Unpack[ConfigDict]) -> None:
        super().__init_subclass__(**settings)
        cls.own = Decides(decides)

    @classmethod
    def decision(cls, field: FieldInfo) -> Decides:
        """Return what one of this section's knobs decides."""
        return next((mark for mark in field.metadata if isinstance(mark, Decides)), cls.own)


def section_in(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds, or may hold; None for a knob."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
