"""How a round trains on what it made: pairs and which, meta-judge pairs, when to stop."""

from typing import Annotated, Literal

from pydantic import Field

from srlm_mega.config.section import Decides, Section

Share = Annotated[float, Field(ge=0, le=1)]
Ties = Literal["random", "shortest", "lowest_variance"]


class RoundConfig(Section, decides="output"):
    """What makes M(t+1)."""

    method: Literal["dpo", "positives_sft"] = Field(
        "dpo", description="positives_sft: SFT of M0 on the seed and the responses with a perfect score (ablation)."
    )
    max_positives: int | None = Field(
        None, ge=1, description="positives_sft: a seeded sample of this many weighs them against the seed; null: all."
    )


class PairsConfig(Section, decides="output"):
    """Which candidates become a pair. Lengths are characters."""

    min_gap: float = Field(0.0, ge=0, description="Pairs need a score gap above this.")
    min_pairs: Annotated[int, Decides("limit")] = Field(
        1, ge=1, description="Fewer pairs than this stop the run (exit code 3)."
    )
    rho: Share | Annotated[tuple[Share, ...], Field(min_length=1)] = Field(
        0.0, description="Length control: share of the score gap within which the shortest is chosen and the longest "
        "rejected. A list has a value per round; its last one goes on."
    )  # fmt: skip
    ties: Ties = Field("random", description="Who is taken of equally scored candidates, with rho 0; random is seeded.")
    max_chosen_length: int | None = Field(None, ge=1, description="Longer responses are never chosen.")
    rejected_from: Literal["round", "M0", "M1"] = Field(
        "round", description="M0, M1: an anchor answers the prompts too, and rejected responses are its worst ones."
    )
    consistency: bool = Field(
        False, description="From round 2: weigh a pair by how far M(t) and M(t-1) rank its prompt's candidates alike."
    )

    def rho_of(self, number: int) -> float:
        """The value of round `number`, which is 1 for the first."""
        if isinstance(self.rho, float):
            return self.rho
        return self.rho[min(number, len(self.rho)) - 1]

    def weighs_consistency(self, number: int) -> bool:
        """True where pairs of round `number` are weighed; round 1 has no previous model to agree with."""
        return self.consistency and number > 1


class MetaJudgeConfig(Section, decides="output"):
    """The model compares its own judgements; best and worst become pairs that train the judge. It decodes as the judge
    does (section judge)."""

    enabled: bool = Field(False, description="Train the judge too, on pairs of its own judgements.")
    max_share: float = Field(0.15, gt=0, lt=1, description="Largest share of a round's pairs that are of judgements.")
    max_chosen_length: int = Field(1100, ge=1, description="Characters; a longer judgement is never chosen.")


class Limit(Section, decides="limit"):
    """Where a figure becomes a warning, and where it stops the run (exit code 3); null: never."""

    warn: float | None = Field(None, description="The figure from which there is a warning; null: never.")
    stop: float | None = Field(None, description="The figure from which the run stops (exit code 3); null: never.")


class HealthConfig(Section, decides="limit"):
    """Figures of a round, looked at before it trains. What each is: docs/protocol.md."""

    parse_failure: Limit = Field(Limit(warn=0.05), description="Judgements without a readable score, above.")
    truncation: Limit = Field(Limit(warn=0.01), description="Candidates cut at the length limit, above.")
    tie_rate: Limit = Field(Limit(warn=0.5), description="Prompts whose best and worst score are equal, above.")
    score_entropy: Limit = Field(Limit(warn=0.8), description="Bits of the scores' distribution, below.")
    duplicates: Limit = Field(Limit(warn=0.25), description="Candidates like another of their prompt, above.")
    chosen_length: Limit = Field(Limit(warn=1.5), description="Chosen over rejected characters, means, above.")
    length_growth: Limit = Field(
        Limit(warn=1.5), description="Held-out responses' length over the last model's, above."
    )
    agreement_drop: Limit = Field(Limit(warn=0.02), description="Fall in accuracy on EFT-eval, ties half, above.")
