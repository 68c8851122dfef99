"""The figures of a round against their limits, by hand."""

from dataclasses import replace

import pytest

from srlm_mega.config.rounds import HealthConfig, Limit
from srlm_mega.evaluation.health_limits import HealthFigure, round_health, sampler_health
from srlm_mega.evaluation.judge_metrics import judge_metrics
from srlm_mega.evaluation.results import ModelEvaluation
from srlm_mega.judging.pair_counts import PairCounts

COUNTS = PairCounts(
    prompts=100, pairs=60, tied=36, small_gap=0, identical=0, too_few=4, candidates=400, scored=394, truncated=2,
    unscored=4, judgements=1200, unparsed=24, duplicates=40, score_entropy=2.0, mean_gap=1.5, mean_chosen_length=120.0,
    mean_rejected_length=100.0, judgements_truncated=12,
)  # fmt: skip


def evaluation(right: int, wrong: int, mean_length: float) -> ModelEvaluation:
    prompts = [[(0, 5.0), (1, 3.0)]] * right + [[(0, 3.0), (1, 5.0)]] * wrong
    judge = judge_metrics(prompts)
    return ModelEvaluation("M", None, None, None, None, None, judge, judge, mean_length)


def figures(counts: PairCounts = COUNTS, limits: HealthConfig = HealthConfig()) -> dict[str, HealthFigure]:  # noqa: B008
    return round_health(2, counts, evaluation(7, 3, 130.0), evaluation(8, 2, 100.0), limits, 0.001).figures


def test_figures_by_hand() -> None:
    found = {key: figure.value for key, figure in figures().items()}
    assert found == pytest.approx(
        {
            "unknown_tokens": 0.001,
            "parse_failure": 0.02,
            "truncation": 0.005,
            "judge_truncation": 0.01,
            "tie_rate": 36 / 96,
            "score_entropy": 2.0,
            "duplicates": 0.1,
            "chosen_length": 1.2,
            "length_growth": 1.3,
            "agreement_drop": 0.1,
        }
    )
    assert [*sampler_health(2, [], HealthConfig(), "fp32").figures, *found] == list(HealthConfig.model_fields)


def test_only_what_is_beyond_a_limit_warns() -> None:
    states = {key: figure.state for key, figure in figures().items()}
    assert states.pop("agreement_drop") == "warn" and set(states.values()) == {"fine"}
    on_it = figures(limits=HealthConfig(parse_failure=Limit(warn=0.02)))
    assert on_it["parse_failure"].state == "fine", "on a limit is not beyond it"
    low = figures(limits=HealthConfig(score_entropy=Limit(warn=2.5, stop=2.1)))
    assert low["score_entropy"].state == "stop", "entropy is bad when it is low"


def test_nothing_stops_unless_it_is_asked_to() -> None:
    awful = replace(COUNTS, unparsed=1200, tied=96, truncated=400, score_entropy=0.0, duplicates=400)
    health = round_health(2, awful, evaluation(0, 10, 900.0), evaluation(10, 0, 100.0), HealthConfig())
    assert health.state == "warn"
    strict = HealthConfig(parse_failure=Limit(warn=0.05, stop=0.2))
    assert round_health(2, awful, evaluation(1, 1, 1.0), None, strict).state == "stop"


def test_what_cannot_be_measured_stops_nothing() -> None:
    nothing = PairCounts(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    strict = HealthConfig.model_validate({key: {"stop": 0.0} for key in HealthConfig.model_fields})
    for health in (
        round_health(1, nothing, evaluation(1, 0, 5.0), None, strict),
        sampler_health(1, [], strict, "fp32"),
    ):
        assert health.state == "fine" and {figure.state for figure in health.figures.values()} == {"unknown"}
