"""The rounds' health.json side by side: every figure, its limits, and what it is held to be."""

from dataclasses import dataclass

from srlm_mega.evaluation.health_limits import HealthFigure, RoundHealth
from srlm_mega.records import parse_line
from srlm_mega.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class HealthTable:
    """Figures by their key, one per round of `rounds`; None where that round has no such figure."""

    rounds: tuple[int, ...]
    rows: dict[str, tuple[HealthFigure | None, ...]]

    def limits(self, key: str) -> HealthFigure:
        """The figure of the newest round that has it, for its limits."""
        return next(figure for figure in reversed(self.rows[key]) if figure is not None)


def health_table(run: RunDir, rounds: int) -> HealthTable | None:
    """All rounds that have one; None when there is none."""
    found = {number: health for number in range(1, rounds + 1) if (health := read_health(run, number)) is not None}
    keys = dict.fromkeys(key for health in found.values() for key in health.figures)
    if not keys:
        return None
    return HealthTable(tuple(found), {key: tuple(one.figures.get(key) for one in found.values()) for key in keys})


def read_health(run: RunDir, number: int) -> RoundHealth | None:
    """One round's; of a round that its health stopped, the partial stage's."""
    stage = f"round_{number}/health"
    for folder in (run.output(stage), run.partial(stage)):
        path = folder / "health.json"
        if path.is_file():
            return parse_line(RoundHealth, path.read_bytes())
    return None
