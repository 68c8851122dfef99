"""Planned and measured figures, if RUN/plan.json holds the output of `srlm plan CONFIG --json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from srlm_mega.errors import UserError
from srlm_mega.report.costs import StageCost
from srlm_mega.run.run_dir import RunDir

FILE = "plan.json"


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One planned figure; `measured` is None until its stage is finished."""

    name: str
    planned: float
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured divided by planned, None without a measurement."""
        return None if self.measured is None or not self.planned else self.measured / self.planned


def planned_rows(run: RunDir, costs: Sequence[StageCost]) -> list[PlannedRow]:
    """Return a DPO step's figures and then the seconds of every stage; empty without a plan. UserError for a file that
    is none."""
    path = run.root / FILE
    if not path.is_file():
        return []
    by_stage: dict[str, float] = {}
    try:
        plan = orjson.loads(path.read_bytes())
        for stage in plan["stages"]:  # training and the conversion after it are two entries of one stage
            by_stage[stage["name"]] = by_stage.get(stage["name"], 0.0) + stage["seconds"]
        step = step_rows(plan, costs)
    except (ValueError, TypeError, LookupError, ZeroDivisionError) as error:
        wrong = f"{path} is not what `srlm plan CONFIG --json` prints ({error!r}): make it again, or remove it"
        raise UserError(wrong) from None
    taken = {cost.stage.name: cost.seconds for cost in costs}
    return step + [PlannedRow(f"{name}, seconds", seconds, taken.get(name)) for name, seconds in by_stage.items()]


def step_rows(plan: Mapping[str, Any], costs: Sequence[StageCost]) -> list[PlannedRow]:
    """Return the plan's DPO step compared with the newest DPO training, by medians over its steps."""
    trained = [cost.training for cost in costs if cost.training and cost.stage.round > 0]
    rates: Mapping[str, float] = trained[-1] if trained else {}
    step = plan["step"]
    speed = step["tokens"] / step["total"] / plan["gpus"]
    return [
        PlannedRow("DPO step, seconds", step["total"], rates.get("step_seconds")),
        PlannedRow("DPO, tokens/s per GPU", speed, rates.get("useful_tokens/s/GPU")),
        PlannedRow("DPO, MFU", step["mfu"], rates.get("MFU_causal")),
    ]
