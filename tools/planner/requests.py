"""The requests of each sampling stage to a model: how many, of how many tokens."""

from dataclasses import dataclass

from srlm_mega.config import Config
from srlm_mega.run.stage_kinds import Estimate
from srlm_mega.tools.planner.training_steps import Lengths

PROMPTS_PER_REQUEST = 4  # new instructions that pass the filters, of a Self-Instruct request
REPLIES_PER_SOURCE = 4  # ranked replies that EFT is built from


@dataclass(frozen=True)
class Requests:
    """`count` prompts of `prompt` tokens; each is answered `samples` times with `output` tokens."""

    count: float
    prompt: int
    samples: int
    output: int


def requests_of(estimate: Estimate, config: Config, lengths: Lengths) -> list[Requests]:
    """Return the requests of a kind of stage to a model; empty where it samples nothing."""
    prompts, judged = config.prompts.per_round, lengths.judge_template + lengths.sequence
    answers = Requests(prompts, lengths.prompt, config.candidates.n, lengths.response)
    judgements = Requests(prompts * config.candidates.n, judged, config.judge.n, lengths.judgement)
    match estimate:
        case Estimate.PROMPTS:
            return new_prompts(config, lengths)
        case Estimate.CANDIDATES:
            return [answers]
        case Estimate.JUDGEMENTS:
            return [] if config.judge.backend == "random" else [judgements]
        case Estimate.META_JUDGEMENTS:  # two judgements of a response side by side, in both orders
            compared = prompts * config.judge.n * (config.judge.n - 1)
            return [Requests(compared, judged + 2 * lengths.judgement, 1, lengths.judgement)]
        case Estimate.EFT:
            replies = config.seed_data.num_eft_sources * REPLIES_PER_SOURCE
            return [Requests(replies, judged, config.eft.attempts, lengths.judgement)]
        case Estimate.EVALUATION:
            held_out = config.seed_data.num_test or config.seed_data.num_validation
            samples = config.judge.n * config.evaluation.judge_replicates
            return [
                Requests(held_out, lengths.prompt, 2, lengths.response),
                Requests(config.seed_data.num_eft_eval, judged, samples, lengths.judgement),
            ]
        case Estimate.NO_GPU | Estimate.FORWARD_PASS | Estimate.CONVERSION:
            return []
        case Estimate.PRETRAINING | Estimate.SFT_ON_IFT | Estimate.SFT | Estimate.SFT_ON_POSITIVES | Estimate.DPO:
            return []


def new_prompts(config: Config, lengths: Lengths) -> list[Requests]:
    """Return Self-Instruct's requests: shots in, several new instructions out, which alone are a third of a prompt."""
    if config.prompts.generator == "file":
        return []
    shots = (config.prompts.shots_ift + config.prompts.shots_generated) * lengths.prompt // 3
    return [Requests(config.prompts.per_round / PROMPTS_PER_REQUEST, shots, 1, PROMPTS_PER_REQUEST * lengths.prompt)]
