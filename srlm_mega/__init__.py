"""Train self-rewarding language models: the public Python API. docs/python.md has an example of each part.

What is not named here is private: it may change in any version without a word. A name's module is loaded when the
name is first used, so that `import srlm_mega` costs nothing, and a run can be read without torch.
"""

from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srlm_mega.checkpoints_conversion.bits import DType as DType
    from srlm_mega.checkpoints_conversion.build import Resources as Resources
    from srlm_mega.checkpoints_conversion.convert import Kind as Kind
    from srlm_mega.checkpoints_conversion.convert import Wish as Wish
    from srlm_mega.checkpoints_conversion.convert import convert as convert
    from srlm_mega.checkpoints_conversion.verify import prove as prove
    from srlm_mega.config.rounds import PairsConfig as PairsConfig
    from srlm_mega.data.rouge import RougePool as RougePool
    from srlm_mega.errors import UserError as UserError
    from srlm_mega.evaluation.judge_metrics import judge_metrics as judge_metrics
    from srlm_mega.judging.pairs import pair_of as pair_of
    from srlm_mega.judging.scored_candidates import ScoredCandidate as ScoredCandidate
    from srlm_mega.judging.scores import mean_score as mean_score
    from srlm_mega.judging.scores import parse_score as parse_score
    from srlm_mega.kernels.ops import DpoSettings as DpoSettings
    from srlm_mega.kernels.ops import dpo_loss as dpo_loss
    from srlm_mega.kernels.ops import vp_linear_logprob as vp_linear_logprob
    from srlm_mega.records import Candidate as Candidate
    from srlm_mega.records import Judgement as Judgement
    from srlm_mega.records import PreferencePair as PreferencePair
    from srlm_mega.records import Prompt as Prompt
    from srlm_mega.report.open_run import FinishedModel as FinishedModel
    from srlm_mega.report.open_run import Run as Run
    from srlm_mega.report.open_run import TrainingStep as TrainingStep
    from srlm_mega.report.open_run import open_run as open_run

MODULES = {
    "checkpoints_conversion.bits": ("DType",),
    "checkpoints_conversion.build": ("Resources",),
    "checkpoints_conversion.convert": ("Kind", "Wish", "convert"),
    "checkpoints_conversion.verify": ("prove",),
    "config.rounds": ("PairsConfig",),
    "data.rouge": ("RougePool",),
    "errors": ("UserError",),
    "evaluation.judge_metrics": ("judge_metrics",),
    "judging.pairs": ("pair_of",),
    "judging.scored_candidates": ("ScoredCandidate",),
    "judging.scores": ("mean_score", "parse_score"),
    "kernels.ops": ("DpoSettings", "dpo_loss", "vp_linear_logprob"),
    "records": ("Candidate", "Judgement", "PreferencePair", "Prompt"),
    "report.open_run": ("Run", "FinishedModel", "TrainingStep", "open_run"),
}


def __getattr__(name: str) -> object:
    for module, names in MODULES.items():
        if name in names:
            return resolve_name(f"{__name__}.{module}:{name}")
    raise AttributeError(f"srlm_mega has no public {name}: docs/python.md lists what there is")


def __dir__() -> list[str]:
    return sorted(name for names in MODULES.values() for name in names)
