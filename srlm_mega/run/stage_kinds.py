"""Every kind of stage in one table: the place of its output, the function that makes it, and how that function runs.

A new stage is a row here, its function, and its place in plan.py. Names of outputs are put together nowhere else.
"""

from dataclasses import dataclass, replace
from enum import StrEnum, auto


class Part(StrEnum):
    """Parts of the loop by which the report sums up time, in the order of its bars (colours: report/plots.py)."""

    SEED = "seed"
    PROMPTS = "prompts"
    CANDIDATES = "candidates"
    JUDGEMENTS = "judgements"
    PAIRS = "pairs"
    REFERENCE = "reference"
    TRAINING = "training"
    EVALUATION = "evaluation"
    OTHER = "other"


class Estimate(StrEnum):
    """The arithmetic by which `srlm plan` estimates a stage's requests and time (tools/planner)."""

    NO_GPU = auto()
    PRETRAINING = auto()
    SFT_ON_IFT = auto()
    SFT = auto()
    SFT_ON_POSITIVES = auto()
    DPO = auto()
    FORWARD_PASS = auto()
    CONVERSION = auto()
    PROMPTS = auto()
    CANDIDATES = auto()
    JUDGEMENTS = auto()
    META_JUDGEMENTS = auto()
    EFT = auto()
    EVALUATION = auto()


BEFORE_ROUNDS = ("M0", "M1")  # models that are compared with none
OUTSIDE_ROUNDS = ("M0", "sft_baseline", "prompt_writer")  # models that no round makes


@dataclass(frozen=True)
class StageKind:
    """One row: a kind of stage.

    `place`: the output's folder in the run, of a {round} or of a {model}. `function`: the import path of the function
    that makes it, loaded only in the process that runs it. `parallel`: it runs on all ranks of a torchrun job.
    `trains`: it does so step by step, and leaves a checkpoint when it is asked to stop. `samples`: it samples models,
    by all replicas. `converts`: it makes what the sampler loads, in the sampler's environment. `resumable`: it resumes
    what a killed attempt left; others begin anew.
    """

    place: str
    function: str
    part: Part
    estimate: Estimate
    parallel: bool = False
    trains: bool = False
    samples: bool = False
    converts: bool = False
    resumable: bool = False

    def of(self, subject: int | str) -> str:
        """Return the name of its output, given a round (a number; 0 is before the first one) or a model (a name)."""
        return self.place.format(**{"round": round_folder(subject)} if isinstance(subject, int) else {"model": subject})


def model_name(number: int) -> str:
    """Return the name of M0, M1, ...: round t makes M(t+1)."""
    return f"M{number}"


def model_number(name: str) -> int:
    """Return a model's number, 3 for M3. ValueError for a model that is none of M0, M1, ..."""
    return int(name.removeprefix("M"))


def round_folder(number: int) -> str:
    """Return the folder of a round's outputs."""
    return f"round_{number}"


def training(place: str, function: str, part: Part, estimate: Estimate) -> StageKind:
    """Return the row of a stage that trains: on all ranks, and resumed from its checkpoints."""
    return StageKind(place, function, part, estimate, parallel=True, trains=True, resumable=True)


# fmt: off
# Before the first round.
SEED = StageKind("seed", "srlm_mega.stages.seed:make_seed", Part.SEED, Estimate.NO_GPU)
BASE = StageKind("M0", "srlm_mega.stages.base:make_base", Part.TRAINING, Estimate.NO_GPU)
PRETRAINED_BASE = training("M0", "srlm_mega.stages.train:pretrain", Part.TRAINING, Estimate.PRETRAINING)
SFT_BASELINE = training("sft_baseline", "srlm_mega.stages.train:baseline", Part.OTHER, Estimate.SFT_ON_IFT)
EFT = StageKind(
    "eft", "srlm_mega.stages.eft:build_eft", Part.OTHER, Estimate.EFT,
    samples=True, resumable=True,
)
EFT_FROM_RANKS = StageKind("eft", "srlm_mega.stages.eft:score_by_rank", Part.OTHER, Estimate.NO_GPU)
SFT = training("M1", "srlm_mega.stages.train:supervised", Part.TRAINING, Estimate.SFT)
PROMPT_WRITER = StageKind("prompt_writer", "srlm_mega.stages.base:take_writer", Part.OTHER, Estimate.NO_GPU)

# One per model.
SAMPLER_WEIGHTS = StageKind(
    "{model}/sampler_weights", "srlm_mega.stages.sampler_weights:make_sampler_weights", Part.OTHER, Estimate.CONVERSION,
    converts=True,
)
EVALUATION = StageKind(
    "{model}/evaluation", "srlm_mega.stages.evaluate:evaluate", Part.EVALUATION, Estimate.EVALUATION,
    samples=True, resumable=True,
)

# One per round.
PROMPTS = StageKind(
    "{round}/prompts", "srlm_mega.stages.prompts:write_prompts", Part.PROMPTS, Estimate.PROMPTS,
    samples=True, resumable=True,
)
CANDIDATES = StageKind(
    "{round}/candidates", "srlm_mega.stages.sample_and_judge:sample_candidates", Part.CANDIDATES, Estimate.CANDIDATES,
    samples=True, resumable=True,
)
JUDGEMENTS = StageKind(
    "{round}/judgements", "srlm_mega.stages.sample_and_judge:judge_candidates", Part.JUDGEMENTS, Estimate.JUDGEMENTS,
    samples=True, resumable=True,
)
ANCHORS = replace(CANDIDATES, place="{round}/anchors", part=Part.OTHER)
ANCHOR_JUDGEMENTS = replace(JUDGEMENTS, place="{round}/anchor_judgements", part=Part.OTHER)
PREVIOUS_JUDGEMENTS = replace(JUDGEMENTS, place="{round}/previous_judgements", part=Part.OTHER)
PAIRS = StageKind("{round}/pairs", "srlm_mega.stages.pairing:select_pairs", Part.PAIRS, Estimate.NO_GPU)
HEALTH = StageKind("{round}/health", "srlm_mega.stages.health:check_health", Part.OTHER, Estimate.NO_GPU)
META_JUDGEMENTS = StageKind(
    "{round}/meta_judgements", "srlm_mega.stages.meta_judge:judge_judgements", Part.OTHER, Estimate.META_JUDGEMENTS,
    samples=True, resumable=True,
)
REFERENCE = StageKind(
    "{round}/reference", "srlm_mega.stages.train:reference", Part.REFERENCE, Estimate.FORWARD_PASS, parallel=True
)
POSITIVES = StageKind("{round}/positives", "srlm_mega.stages.pairing:select_positives", Part.OTHER, Estimate.NO_GPU)

# Trainings that make M(t+1) from M(t).
DPO = training("{model}", "srlm_mega.stages.train:preference", Part.TRAINING, Estimate.DPO)
SFT_ON_POSITIVES = training(
    "{model}", "srlm_mega.stages.train:supervised_with_positives", Part.TRAINING, Estimate.SFT_ON_POSITIVES
)
# fmt: on
