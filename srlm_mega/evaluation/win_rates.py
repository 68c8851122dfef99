"""Win rates of one model against another on the same prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import with_config

from srlm_mega.judging.pairwise import Outcome
from srlm_mega.records import STRICT

QUALITY_TOLERANCE = 1e-6
Z_95 = 1.959963984540054
# Without a true difference, five prompts all differ in the same direction once in 2 ** 4 = 16 times, six once in 32.
FEWEST_PROMPTS = 6


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class HeadToHead:
    """Wins, ties and losses over `comparisons`; rates are shares of them. `score` counts a tie one half; `score_low`
    and `score_high` are its 95 % interval (Wilson's)."""

    prompts: int
    comparisons: int
    wins: int
    ties: int
    losses: int
    score: float
    score_low: float
    score_high: float

    @property
    def win_rate(self) -> float:
        """Share of comparisons won."""
        return self.wins / self.comparisons

    @property
    def tie_rate(self) -> float:
        """Share of comparisons tied."""
        return self.ties / self.comparisons

    @property
    def loss_rate(self) -> float:
        """Share of comparisons lost."""
        return self.losses / self.comparisons


def head_to_head(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> HeadToHead:
    """Compare qualities by prompt id: sample i of one model with sample i of the other.

    Raise ValueError unless both have the same prompts, at least one, with the same numbers of samples.
    """
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError(f"head-to-head needs the same prompts on both sides, got {len(ours)} and {len(theirs)}")
    differences = [
        mine - other for prompt_id in ours for mine, other in zip(ours[prompt_id], theirs[prompt_id], strict=True)
    ]
    wins = sum(difference > QUALITY_TOLERANCE for difference in differences)
    losses = sum(difference < -QUALITY_TOLERANCE for difference in differences)
    ties = len(differences) - wins - losses
    score = (wins + ties / 2) / len(differences)
    low, high = wilson_interval(score, len(ours))
    return HeadToHead(len(ours), len(differences), wins, ties, losses, score, low, high)


def head_to_head_of(outcomes: Mapping[str, Outcome]) -> HeadToHead:
    """Count outcomes by prompt id, as a judge in both orders gives them."""
    ours = {prompt_id: [float(outcome == "win")] for prompt_id, outcome in outcomes.items()}
    theirs = {prompt_id: [float(outcome == "loss")] for prompt_id, outcome in outcomes.items()}
    return head_to_head(ours, theirs)


def wilson_interval(share: float, trials: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share. With ties as halves it is conservative: an outcome in [0, 1] varies at
    most as much as a 0/1 one of the same mean. `trials` are prompts: samples of one prompt are not independent."""
    shrink = 1 + Z_95**2 / trials
    centre = (share + Z_95**2 / (2 * trials)) / shrink
    half = Z_95 * math.sqrt(share * (1 - share) / trials + Z_95**2 / (4 * trials**2)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)
