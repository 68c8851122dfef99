"""Early stopping as rules and files: which checkpoint is compared next, which is kept, when training ends.

Its files are in `<stage>.partial/early_stopping/`: `step_0000200/` with the checkpoint's Hugging Face folder, its
responses and the judgements, and `verdict.json`, written last. The next thing to do follows from the files alone, so
that training, which makes the checkpoints, and judging, which compares them, know nothing of each other and resume
after a kill at any time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import orjson
from pydantic import with_config

from srlm_mega.config.comparison import EarlyStoppingConfig
from srlm_mega.errors import UserError
from srlm_mega.evaluation.results import Comparison
from srlm_mega.records import STRICT, parse_line
from srlm_mega.run.manifest import FileEntry, damage, entry_of
from srlm_mega.run.run_dir import files_below
from srlm_mega.run.sealed_file import has_its_seal, write_sealed

START = 0  # the model that training started from is the checkpoint of step 0


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of comparing the checkpoint of `step` with the best one before it, of step `against`. `kept` is the better
    of them, `lost_in_a_row` the number of latest comparisons that were lost; with `stop`, training ends here."""

    step: int
    against: int
    comparison: Comparison
    kept: int
    lost_in_a_row: int
    stop: bool
    reason: str


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Exported:
    """Counts of a training up to a checkpoint whose Hugging Face folder, with these `files`, is complete; its schedule
    has `max_steps`."""

    max_steps: int
    items: int
    excluded: int
    verified: int
    files: Mapping[str, FileEntry] = field(default_factory=dict)


def comparison_steps(interval: int, steps: int) -> list[int]:
    """Return the steps after which there is a comparison: every `interval`, and the last one."""
    return [*range(interval, steps, interval), steps]


def decide(
    settings: EarlyStoppingConfig, step: int, steps: int, comparison: Comparison, earlier: Sequence[Verdict]
) -> Verdict:
    """Decide what follows from a comparison of the checkpoint of `step`, out of `steps`, with the best one before."""
    assert comparison.result is not None, "a comparison without any verdict decides nothing"
    best, score = kept_step(earlier), comparison.result.score
    better = score >= settings.stop_below
    lost = 0 if better else (earlier[-1].lost_in_a_row if earlier else 0) + 1
    stop = lost >= settings.patience or step == steps
    found = f"step {step} scores {score:.3f} against step {best}"
    if better:
        reason = f"{found}, {settings.stop_below} or more: it is kept"
    else:
        reason = f"{found}, below {settings.stop_below}: step {best} is kept"
    end = "; this was the last step" if step == steps else "; training stops" if stop else ""
    return Verdict(step, best, comparison, step if better else best, lost, stop, reason + end)


def kept_step(verdicts: Sequence[Verdict]) -> int:
    """Return the step of the best checkpoint so far."""
    return verdicts[-1].kept if verdicts else START


class EarlyStoppingFiles:
    """Files of one training stage's early stopping."""

    def __init__(self, stage_folder: Path) -> None:
        self.folder = stage_folder / "early_stopping"

    def step_folder(self, step: int) -> Path:
        """Return the folder of one checkpoint."""
        return self.folder / f"step_{step:07d}"

    def export(self, step: int) -> Path:
        """Return a checkpoint's Hugging Face folder."""
        return self.step_folder(step) / "huggingface"

    def responses(self, step: int) -> Path:
        """Return the file of a checkpoint's greedy responses to the validation prompts."""
        return self.step_folder(step) / "responses.jsonl"

    def judgements(self, step: int) -> Path:
        """Return the file of the judgements that compare a checkpoint with the best one before it."""
        return self.step_folder(step) / "judgements.jsonl"

    def record(self, step: int) -> Path:
        """Return the file that says what was exported of a checkpoint."""
        return self.step_folder(step) / "exported.json"

    def verdict(self, step: int) -> Path:
        """Return the file that ends a checkpoint's comparison."""
        return self.step_folder(step) / "verdict.json"

    def verdicts(self) -> list[Verdict]:
        """Read the verdicts of all comparisons so far, in order, up to the first that is not as it was written: that
        comparison is repeated from its responses and judgements."""
        whole = takewhile(partial(has_its_seal, unsealed=True), map(self.verdict, self._steps()))
        return [parse_line(Verdict, path.read_bytes()) for path in whole]

    def exported(self, step: int) -> Exported | None:
        """Read the counts of a checkpoint, None unless its Hugging Face folder is complete."""
        path = self.record(step)
        return parse_line(Exported, path.read_bytes()) if has_its_seal(path, unsealed=True) else None

    def write_exported(self, step: int, exported: Exported) -> None:
        """Mark a checkpoint's Hugging Face folder as complete."""
        folder = self.export(step)
        files = {str(path.relative_to(folder)): entry_of(path) for path in files_below(folder)}
        content = orjson.dumps(replace(exported, files=files))
        write_sealed(self.record(step), lambda path: path.write_bytes(content))

    def damage(self, step: int, folder: Path) -> str | None:
        """Return how a checkpoint's Hugging Face folder, wherever it is now, differs from what was exported; None when
        it does not."""
        exported = self.exported(step)
        files = {} if exported is None else exported.files
        found = (damage(folder / name, entry, "exported.json", "exported.json") for name, entry in files.items())
        return next((text for text in found if text is not None), None)

    def write_verdict(self, verdict: Verdict) -> None:
        """Write a comparison's verdict, which ends it."""
        content = orjson.dumps(verdict, option=orjson.OPT_INDENT_2)
        write_sealed(self.verdict(verdict.step), lambda path: path.write_bytes(content))

    def waiting(self) -> int | None:
        """Return the step of the checkpoint to compare next, None when there is none. UserError when the record of its
        export was lost or damaged."""
        compared = {verdict.step for verdict in self.verdicts()}
        step = next((step for step in self._steps() if step not in compared), None)
        if step is not None and self.exported(step) is None:
            raise UserError(f"{self.record(step)} is missing or damaged: restore it")
        return step

    def _steps(self) -> list[int]:
        """Return the steps whose checkpoints were exported, in order, also where one of their two records was lost."""
        found = (path for name in ("exported", "verdict") for path in self.folder.glob(f"step_*/{name}.json"))
        return sorted({int(path.parent.name.removeprefix("step_")) for path in found})
