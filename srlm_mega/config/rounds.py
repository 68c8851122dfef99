"""Training of a round: the method, which pairs, meta-judge pairs, and limits that stop it."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from srlm_mega.config.section import Decides, Section
from srlm_mega.config.training import Precision

Share = Annotated[float, Field(ge=0, le=1)]
Ties = Literal["random", "shortest", "lowest_variance"]


class RoundConfig(Section, decides="output"):
    """The method that makes M(t+1) from M(t)."""

    method: Literal["dpo", "positives_sft"] = Field(
        "dpo", description="DPO on pairs, or positives_sft: SFT of M0 on the seed and perfect responses (ablation)."
    )
    max_positives: int | None = Field(
        None, ge=1, description="Largest number of perfect responses, a seeded sample (positives_sft); null: all."
    )


class PairsConfig(Section, decides="output"):
    """Rules by which candidates become a pair. Lengths are in characters."""

    min_gap: float = Field(0.0, ge=0, description="Score gap that a pair must exceed, in points.")
    min_pairs: Annotated[int, Decides("limit")] = Field(
        1, ge=1, description="Smallest number of pairs; fewer stop the run (exit code 3)."
    )
    rho: Share | Annotated[tuple[Share, ...], Field(min_length=1)] = Field(
        0.0, description="Length control: share of the score gap within which the shortest is chosen and the longest "
        "rejected. A list has a value per round; the last one holds for later rounds."
    )  # fmt: skip
    ties: Ties = Field("random", description="Choice among equally scored candidates, with rho 0; random is seeded.")
    max_chosen_length: int | None = Field(None, ge=1, description="Longest response that may be chosen, in characters.")
    rejected_from: Literal["round", "M0", "M1"] = Field(
        "round", description="Source of rejected responses: the round, or an anchor's answers (M0, M1) to its prompts."
    )
    consistency: bool = Field(
        False, description="From round 2: weigh a pair by the agreement of M(t)'s and M(t-1)'s ranking of its prompt."
    )

    def rho_of(self, number: int) -> float:
        """Return the share of round `number`; the first round is 1."""
        if isinstance(self.rho, float):
            return self.rho
        return self.rho[min(number, len(self.rho)) - 1]

    def weighs_consistency(self, number: int) -> bool:
        """Tell whether pairs of round `number` are weighed; round 1 has no previous model to agree with."""
        return self.consistency and number > 1


class MetaJudgeConfig(Section, decides="output"):
    """Meta-judge: the model compares its own judgements; best and worst become pairs that train it as a judge. It is
    sampled as the judge is (section judge)."""

    enabled: bool = Field(False, description="Train the model as a judge too, on pairs of its own judgements.")
    max_share: float = Field(0.15, gt=0, lt=1, description="Largest share of judgement pairs among a round's pairs.")
    max_chosen_length: int = Field(1100, ge=1, description="Longest judgement that may be chosen, in characters.")


class Limit(Section, decides="limit"):
    """Limits of a figure: where it becomes a warning, and where it stops the run (exit code 3)."""

    warn: float | None = Field(None, description="Value from which there is a warning; null: never.")
    stop: float | None = Field(None, description="Value from which the run stops (exit code 3); null: never.")


class PrecisionLimit(Section, decides="limit"):
    """Limits of a difference that rounding alone brings about: auto is what rounding explains in the number format."""

    warn: float | Literal["auto"] | None = Field(
        "auto", description="Value from which there is a warning; auto: by precision; null: never."
    )
    stop: float | Literal["auto"] | None = Field(
        "auto", description="Value from which the run stops (exit code 3); auto: by precision; null: never."
    )

    def resolved(self, auto: Limit) -> Limit:
        """Return the limits with those of `auto` where they are left to the precision."""
        warn = auto.warn if self.warn == "auto" else self.warn
        return Limit(warn=warn, stop=auto.stop if self.stop == "auto" else self.stop)


class HealthConfig(Section, decides="limit"):
    """Limits of a round's figures, causes before what follows from them, checked before it trains; docs/protocol.md
    defines each figure."""

    logprob_difference_mean: PrecisionLimit = Field(
        PrecisionLimit(), description="Mean difference of sampler and trainer, nats per token, at most."
    )
    logprob_difference_max: PrecisionLimit = Field(
        PrecisionLimit(), description="Largest difference of sampler and trainer, nats per token, at most."
    )
    unknown_tokens: Limit = Field(
        Limit(warn=0.005, stop=0.05), description="Share of unknown tokens in the prompts, at most."
    )
    truncation: Limit = Field(Limit(warn=0.01), description="Share of candidates cut off at the length limit, at most.")
    duplicates: Limit = Field(Limit(warn=0.25), description="Share of near-duplicate candidates, at most.")
    judge_truncation: Limit = Field(
        Limit(warn=0.05), description="Share of judgements cut off at the token limit, which have no score, at most."
    )
    parse_failure: Limit = Field(Limit(warn=0.05), description="Share of judgements without a readable score, at most.")
    tie_rate: Limit = Field(Limit(warn=0.5), description="Share of prompts whose candidates score the same, at most.")
    score_entropy: Limit = Field(Limit(warn=0.8), description="Entropy of the scores in bits, at least.")
    chosen_length: Limit = Field(Limit(warn=1.5), description="Mean chosen over mean rejected length, at most.")
    length_growth: Limit = Field(
        Limit(warn=1.5), description="Length of held-out responses over the last model's, at most."
    )
    agreement_drop: Limit = Field(Limit(warn=0.02), description="Fall of the accuracy on EFT-eval, ties half, at most.")


# Mean and largest difference of sampler and trainer (nats per token) that rounding does not explain, as measured in
# docs/protocol.md. By default a single response stops no run.
LOGPROB_LIMITS: Mapping[Precision, tuple[Limit, Limit]] = {
    "fp32": (Limit(warn=0.001, stop=0.01), Limit(warn=0.01)),
    "bf16": (Limit(warn=0.02, stop=0.04), Limit(warn=0.2)),
    "fp8": (Limit(warn=0.1, stop=0.2), Limit(warn=1.0)),
}
