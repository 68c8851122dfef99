"""Judge metrics: vectors worked out by hand, and brute force."""

import math
from itertools import combinations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from srlm_mega.evaluation.judge_metrics import RankedScore, judge_metrics, with_ranks
from srlm_mega.evaluation.results import JudgeMetrics
from srlm_mega.evaluation.run_tables import judge_line
from srlm_mega.records import RankedReplies, RankedReply, parse_line
from srlm_mega.report.page import JUDGE_METRICS, metric

# Pairs: right, right, tied | tied | tied, right, right | inverted: 4 right, 1 inverted, 3 tied.
VECTOR: list[list[RankedScore]] = [
    [(0, 5), (1, 3), (2, 3)],
    [(0, 4), (1, 4)],
    [(0, 5), (1, 5), (2, 1)],
    [(0, 2), (1, None), (2, 3)],
]


def test_the_vector_worked_out_by_hand() -> None:
    metrics = judge_metrics(VECTOR)
    assert metrics.pair_acc_untied == pytest.approx(4 / 5)
    assert metrics.pair_acc_half == pytest.approx(5.5 / 8)
    assert metrics.pair_acc_strict == pytest.approx(4 / 8)
    assert metrics.tie_rate == pytest.approx(3 / 8)
    assert metrics.five_best == pytest.approx(2 / 3)
    assert metrics.five_best_count == 3
    assert metrics.exact_match == 0
    # Spearman: sqrt(3)/2, undefined, sqrt(3)/2, -1. Kendall's tau-b: 2/sqrt(6), undefined, 2/sqrt(6), -1.
    assert metrics.spearman_drop == pytest.approx((math.sqrt(3) - 1) / 3) == pytest.approx(0.244, abs=5e-4)
    assert metrics.spearman_zero == pytest.approx((math.sqrt(3) - 1) / 4) == pytest.approx(0.183, abs=5e-4)
    assert metrics.kendall_drop == pytest.approx((4 / math.sqrt(6) - 1) / 3) == pytest.approx(0.211, abs=5e-4)
    assert metrics.kendall_zero == pytest.approx((4 / math.sqrt(6) - 1) / 4) == pytest.approx(0.158, abs=5e-4)
    assert metrics.parse_failure == pytest.approx(1 / 11)
    assert metrics.fully_parsed_prompts == pytest.approx(3 / 4)
    assert (metrics.prompts, metrics.usable_prompts, metrics.replies, metrics.pairs) == (4, 4, 11, 8)


def test_the_vector_is_not_met_by_inverted_ranks() -> None:
    inverted = judge_metrics([[(-rank, score) for rank, score in prompt] for prompt in VECTOR])
    assert inverted.pair_acc_untied == pytest.approx(1 / 5)
    assert inverted.spearman_drop == pytest.approx(-(math.sqrt(3) - 1) / 3)


def test_exact_match_needs_every_pair_right_and_no_tie() -> None:
    assert judge_metrics([[(1, 3), (0, 5), (2, 1)]]).exact_match == 1
    assert judge_metrics([[(0, 5), (1, 3), (2, 3)]]).exact_match == 0
    assert judge_metrics([[(0, 5), (1, None), (2, 3)]]).exact_match == 1, "the rest of the prompt is used"


def test_what_is_over_prompts_is_over_the_same_prompts() -> None:
    """Those that have two scored replies of different rank; the report and the table print their number."""
    metrics = judge_metrics([[(0, 5), (1, 3)], [(0, 4), (1, 4)], [(0, None), (1, 2)], [(0, 5), (0, 3)], [(0, 1)]])
    assert (metrics.prompts, metrics.usable_prompts) == (5, 2)
    assert metrics.exact_match == metrics.spearman_zero == metrics.kendall_zero == 1 / 2
    assert "| 50.0 (2) | 1.000 / 0.500 | 1.000 / 0.500 |" in judge_line("M1", 3, metrics, None)
    assert metric(metrics.usable_prompts, "usable_prompts") == "2" and "usable_prompts" in JUDGE_METRICS


def test_equal_ranks_make_no_pair() -> None:
    metrics = judge_metrics([[(0, 5), (1, 2), (1, 4)]])
    assert (metrics.pairs, metrics.exact_match, metrics.pair_acc_strict) == (2, 1, 1)


def test_means_that_differ_in_the_last_bit_are_a_tie() -> None:
    metrics = judge_metrics([[(0, 0.1 + 0.2), (1, 0.3)]])
    assert metrics.tie_rate == 1
    assert metrics.spearman_drop is None and metrics.spearman_zero == 0


def test_the_best_is_best_even_where_it_has_no_score() -> None:
    metrics = judge_metrics([[(0, None), (1, 5), (2, 3)]])
    assert metrics.five_best == 0


def test_only_an_average_of_exactly_five_counts_as_five() -> None:
    assert judge_metrics([[(0, 14 / 3), (1, 1)]]).five_best_count == 0


def test_nothing_to_average_is_none_not_a_number() -> None:
    nothing: list[list[list[RankedScore]]] = [[], [[]], [[(0, None), (1, None)]]]
    for prompts in nothing:
        metrics = judge_metrics(prompts)
        assert metrics.pair_acc_untied is None and metrics.tie_rate is None and metrics.exact_match is None
        assert metrics.spearman_drop is None and metrics.five_best is None
    assert judge_metrics([[(0, None), (1, None)]]).parse_failure == 1


def test_scores_are_put_beside_their_replies() -> None:
    ranked = RankedReplies("e", "why?", (RankedReply("a", 1), RankedReply("b", 0)))
    assert with_ranks(ranked, [2.0, None]) == [(1, 2.0), (0, None)]
    with pytest.raises(ValueError):
        with_ranks(ranked, [2.0])


def test_metrics_are_a_json_line() -> None:
    metrics = judge_metrics(VECTOR)
    assert parse_line(JudgeMetrics, orjson.dumps(metrics)) == metrics


Prompts = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.5, 4.0, 5.0, None])), max_size=5), max_size=5
)


@given(Prompts)
def test_pairs_and_correlations_agree_with_brute_force(prompts: list[list[RankedScore]]) -> None:
    right = wrong = tied = usable = 0
    taus = []
    for prompt in prompts:
        valid = [(rank, score) for rank, score in prompt if score is not None]
        concordance, rank_pairs, score_pairs = 0, 0, 0
        for (rank_a, a), (rank_b, b) in combinations(valid, 2):
            agreement = (rank_b - rank_a) * (a - b)
            concordance += (agreement > 0) - (agreement < 0)
            rank_pairs += rank_a != rank_b
            score_pairs += a != b
            if rank_a != rank_b:
                right, wrong, tied = right + (agreement > 0), wrong + (agreement < 0), tied + (a == b)
        usable += rank_pairs > 0
        taus.append(concordance / math.sqrt(rank_pairs * score_pairs) if rank_pairs * score_pairs else None)
    metrics = judge_metrics(prompts)
    pairs = right + wrong + tied
    assert metrics.pairs == pairs
    if pairs:
        assert metrics.pair_acc_half == pytest.approx((right + tied / 2) / pairs)
        assert metrics.tie_rate == pytest.approx(tied / pairs)
    if right + wrong:
        assert metrics.pair_acc_untied == pytest.approx(right / (right + wrong))
    defined = [tau for tau in taus if tau is not None]
    if defined:
        assert metrics.kendall_drop == pytest.approx(sum(defined) / len(defined))
        assert metrics.kendall_zero == pytest.approx(sum(defined) / usable)
    else:
        assert metrics.kendall_drop is None and metrics.kendall_zero == (0 if usable else None)


@given(Prompts)
def test_correlations_are_scipys(prompts: list[list[RankedScore]]) -> None:
    metrics = judge_metrics(prompts)
    for statistic, dropped in ((spearmanr, metrics.spearman_drop), (kendalltau, metrics.kendall_drop)):
        found = []
        for prompt in prompts:
            valid = [(-rank, score) for rank, score in prompt if score is not None]
            if len({rank for rank, _ in valid}) > 1 and len({score for _, score in valid}) > 1:
                found.append(float(statistic(*zip(*valid, strict=True))[0]))
        assert dropped == (pytest.approx(sum(found) / len(found)) if found else None)


def ranks_of(values: list[float]) -> list[float]:
    """Average ranks, by counting."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def pearson(xs: list[float], ys: list[float]) -> float | None:
    """None where one side is constant."""
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    products = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    squares = sum((x - x_mean) ** 2 for x in xs) * sum((y - y_mean) ** 2 for y in ys)
    return products / math.sqrt(squares) if squares else None


@given(Prompts)
def test_spearman_exact_match_and_fives_agree_with_brute_force(prompts: list[list[RankedScore]]) -> None:
    rhos, exact, usable, fives, firsts, full = [], 0, 0, 0, 0, 0
    for prompt in prompts:
        valid = [(rank, score) for rank, score in prompt if score is not None]
        full += len(valid) == len(prompt)
        qualities = ranks_of([float(-rank) for rank, _ in valid])
        rhos.append(pearson(qualities, ranks_of([score for _, score in valid])) if valid else None)
        pairs = [(a, b) for (rank_a, a) in valid for (rank_b, b) in valid if rank_a < rank_b]
        usable += bool(pairs)
        exact += bool(pairs) and all(better > worse for better, worse in pairs)
        for rank, score in valid:
            fives += score == 5
            firsts += score == 5 and all(other >= rank for other, _ in prompt)
    metrics = judge_metrics(prompts)
    defined = [rho for rho in rhos if rho is not None]
    assert metrics.spearman_drop == (pytest.approx(sum(defined) / len(defined)) if defined else None)
    assert metrics.spearman_zero == (pytest.approx(sum(defined) / usable) if usable else None)
    assert metrics.exact_match == (pytest.approx(exact / usable) if usable else None)
    assert (metrics.usable_prompts, metrics.five_best_count) == (usable, fives)
    assert metrics.five_best == (pytest.approx(firsts / fives) if fives else None)
    assert metrics.fully_parsed_prompts == (pytest.approx(full / len(prompts)) if prompts else None)


def test_the_brute_force_of_spearman_averages_tied_ranks() -> None:
    assert ranks_of([5, 5, 1]) == [2.5, 2.5, 1]
    assert pearson(ranks_of([3, 2, 1]), ranks_of([5, 5, 1])) == pytest.approx(math.sqrt(3) / 2)


def test_the_brute_force_is_of_tau_b() -> None:
    """(0,5),(1,5),(2,1): two concordant pairs, one tied in score: tau-b 2/sqrt(3*2), tau-a would be 2/3."""
    assert judge_metrics([VECTOR[2]]).kendall_drop == pytest.approx(2 / math.sqrt(6)) != pytest.approx(2 / 3)
