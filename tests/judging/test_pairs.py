"""Preference pairs: the best against the worst, and everything that must not become a pair."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_mega.config.rounds import PairsConfig
from srlm_mega.judging.pair_counts import PairCounter, PairCounts, pairs_of
from srlm_mega.judging.rewards import rewards_of
from srlm_mega.judging.scored_candidates import ScoredCandidate, scored_prompts
from srlm_mega.records import Candidate, FinishReason, Judgement, PreferencePair


def candidate(number: int, text: str | None = None, finish: FinishReason = "stop", prompt: str = "p") -> Candidate:
    text = f"answer {number}" if text is None else text
    return Candidate(
        id=f"{prompt}-c{number}",
        prompt_id=prompt,
        prompt="why?",
        text=text,
        finish_reason=finish,
        seed=number,
        model_hash="m",
        prompt_token_ids=(1, 2),
        token_ids=tuple(text.encode()),
    )


def judgements(of: Candidate, *scores: float | None) -> list[Judgement]:
    return [
        Judgement(f"{of.id}-j{number}", of.id, "", score, "stop", number, "m") for number, score in enumerate(scores)
    ]


Scored = tuple[Candidate, tuple[float | None, ...]]


@dataclass(frozen=True)
class Selection:
    """What became of candidates."""

    pairs: tuple[PreferencePair, ...]
    scored: tuple[ScoredCandidate, ...]
    counts: PairCounts


def prompts(*scored: Scored, min_valid: int = 1) -> list[list[ScoredCandidate]]:
    candidates = [item for item, _ in scored]
    judged = [judgement for item, scores in scored for judgement in judgements(item, *scores)]
    return list(scored_prompts(candidates, rewards_of(judged, min_valid)))


def select(
    *scored: Scored, min_valid: int = 1, seed: int = 0, anchors: list[list[ScoredCandidate]] | None = None, **rules: Any
) -> Selection:
    groups, counter = prompts(*scored, min_valid=min_valid), PairCounter()
    pairs = tuple(pairs_of(groups, PairsConfig(**rules), 1, seed, counter, anchors))
    return Selection(pairs, tuple(item for group in groups for item in group), counter.counts())


def test_the_best_is_chosen_and_the_worst_rejected() -> None:
    scored = [(candidate(0), (3.0,)), (candidate(1), (5.0, 4.0)), (candidate(2), (1.0, None)), (candidate(3), (2.0,))]
    selection = select(*scored)
    (pair,) = selection.pairs
    assert (pair.chosen_id, pair.rejected_id) == ("p-c1", "p-c2")
    assert (pair.chosen_score, pair.rejected_score) == (4.5, 1.0)
    assert pair.id == "p-pair"
    assert pair.prompt[0].role == "user" and pair.prompt[0].content == "why?"
    assert pair.chosen[0].role == "assistant" and pair.chosen[0].content == "answer 1"
    assert pair.rejected_token_ids == scored[2][0].token_ids and pair.prompt_token_ids == (1, 2)
    assert selection.counts.unparsed == 1 and selection.counts.judgements == 6
    assert [item.variance for item in selection.scored] == [None, 0.5, None, None]


def test_equal_scores_never_make_a_pair() -> None:
    assert select((candidate(0), (4.0,)), (candidate(1), (4.0,))).counts.tied == 1
    thirds = select((candidate(0), (4.0, 4.0, 5.0)), (candidate(1), (13 / 3 + 1e-9,)))
    assert not thirds.pairs and thirds.counts.tied == 1
    assert len(select((candidate(0), (4.0,)), (candidate(1), (4.01,))).pairs) == 1, "a real gap is a pair"


def test_truncated_and_unscored_candidates_take_no_part() -> None:
    selection = select(
        (candidate(0, finish="length"), (5.0,)),
        (candidate(1), (None, None)),
        (candidate(2), ()),
        (candidate(3), (2.0,)),
        (candidate(4), (3.0,)),
    )
    (pair,) = selection.pairs
    assert (pair.chosen_id, pair.rejected_id) == ("p-c4", "p-c3")
    assert (selection.counts.scored, selection.counts.truncated, selection.counts.unscored) == (2, 1, 2)
    assert [item.state for item in selection.scored] == ["truncated", "unscored", "unscored", "scored", "scored"]
    assert all((item.score is None) == (item.state != "scored") for item in selection.scored)


def test_fewer_than_two_scored_drop_the_prompt() -> None:
    counts = select((candidate(0), (5.0,)), (candidate(1), (None,))).counts
    assert (counts.pairs, counts.too_few) == (0, 1)


def test_min_valid_is_asked_of_each_candidate() -> None:
    scored = ((candidate(0), (5.0, None)), (candidate(1), (1.0, 1.0)), (candidate(2), (2.0, 3.0)))
    assert select(*scored).pairs[0].chosen_id == "p-c0"
    assert select(*scored, min_valid=2).pairs[0].chosen_id == "p-c2"


def test_a_gap_of_min_gap_is_not_enough() -> None:
    scored = ((candidate(0), (4.0,)), (candidate(1), (3.5,)))
    assert select(*scored, min_gap=0.5).counts.small_gap == 1
    assert select(*scored, min_gap=0.49).counts.pairs == 1


def test_identical_responses_never_make_a_pair() -> None:
    assert select((candidate(0, "same"), (5.0,)), (candidate(1, "same"), (1.0,))).counts.identical == 1
    selection = select((candidate(0, "same"), (5.0,)), (candidate(1, "same"), (1.0,)), (candidate(2, "other"), (1.0,)))
    assert selection.pairs[0].rejected_id == "p-c2", "the other one of the worst is taken"


def test_one_spelling_of_two_texts_is_identical_too() -> None:
    first, second = candidate(0, "a"), replace(candidate(1, "b"), token_ids=candidate(0, "a").token_ids)
    assert select((first, (5.0,)), (second, (1.0,))).counts.identical == 1


def test_among_several_best_the_seed_picks() -> None:
    scored = [(candidate(number), (5.0 if number < 4 else 1.0,)) for number in range(8)]
    picks = {select(*scored, seed=seed).pairs[0].chosen_id for seed in range(40)}
    assert picks == {f"p-c{number}" for number in range(4)}
    assert select(*scored, seed=3).pairs == select(*scored, seed=3).pairs


def test_a_pick_does_not_depend_on_other_prompts_or_the_order_of_the_file() -> None:
    scored = [(candidate(number), (5.0 if number < 4 else 1.0,)) for number in range(8)]
    others = [(candidate(number, prompt="q"), (float(number),)) for number in range(3)]
    alone = select(*scored).pairs[0]
    assert select(*others, *scored).pairs[1] == alone
    assert select(*reversed(scored)).pairs[0] == alone


def test_files_that_do_not_belong_together_are_refused() -> None:
    first, second = candidate(0), candidate(1)
    both = [*judgements(first, 3.0), *judgements(second, 3.0)]

    def refused(match: str, candidates: list[Candidate], judged: list[Judgement]) -> None:
        with pytest.raises(ValueError, match=match):
            list(scored_prompts(candidates, rewards_of(judged, 1)))

    refused("p-c1 is unknown", [first], both)
    refused("prompt p occurs twice", [first, first], [])
    refused("prompt p occurs twice", [first, candidate(0, prompt="q"), second], [])
    refused("p-c0 occurs twice", [first], judgements(first, 3.0) * 2)
    refused("out of order", [first, second], both[::-1])
    assert len(list(scored_prompts([first, second], rewards_of(both, 1)))) == 1, "the files themselves are fine"


# The vectors of length control: (score, length).
VECTOR = ((5.0, 900), (14 / 3, 300), (2.0, 200), (7 / 3, 800))


def of_lengths(*scores_and_lengths: tuple[float, int]) -> list[Scored]:
    return [
        (candidate(number, chr(97 + number) * length), (score,))
        for number, (score, length) in enumerate(scores_and_lengths)
    ]


@pytest.mark.parametrize(
    ("rho", "chosen", "rejected"),
    [
        (0.0, 5.0, 2.0),
        (0.1, 5.0, 2.0),  # from 4.7 up: 4.67 is just below; down to 2.3: 2.33 just above
        (0.2, 14 / 3, 7 / 3),  # from 5 - 0.2 * 3 = 4.4 up, to 2.6 down
        (1.0, 14 / 3, 7 / 3),  # all are best and worst: the shortest, 2, is above nothing, so the next one is chosen
    ],
)
def test_length_control_by_hand(rho: float, chosen: float, rejected: float) -> None:
    (pair,) = select(*of_lengths(*VECTOR), rho=rho).pairs
    assert (pair.chosen_score, pair.rejected_score) == (chosen, rejected)


def test_length_control_never_turns_a_pair_around() -> None:
    """With rho 1 the worst may be the shortest: chosen must still score above rejected, by more than min_gap."""
    (pair,) = select(*of_lengths((5.0, 900), (4.0, 500), (2.0, 100)), rho=1.0).pairs
    assert (pair.chosen_score, pair.rejected_score) == (4.0, 2.0), "the shortest that has something below it"
    assert select(*of_lengths((5.0, 900), (4.0, 500), (2.0, 100)), rho=1.0, min_gap=2.5).pairs[0].chosen_score == 5.0


def test_too_long_responses_are_never_chosen() -> None:
    scored = of_lengths((5.0, 900), (5.0, 300), (1.0, 2000))
    assert select(*scored, max_chosen_length=300, seed=1).pairs[0].chosen_id == "p-c1"
    counts = select(*scored, max_chosen_length=299).counts
    assert (counts.pairs, counts.long_chosen) == (0, 1)
    assert select(*scored, max_chosen_length=2000).counts.pairs == 1, "a rejected one may be long"


def test_ties_at_the_top_and_bottom() -> None:
    def one(number: int, length: int, *scores: float) -> Scored:
        return candidate(number, chr(97 + number) * length), scores

    scored = [one(0, 30, 5.0, 5.0), one(1, 20, 5.0), one(2, 10, 2.0, 2.0), one(3, 40, 1.0, 3.0), one(4, 50, 2.0)]
    (shortest,) = select(*scored, ties="shortest").pairs
    assert (shortest.chosen_id, shortest.rejected_id) == ("p-c1", "p-c2")
    (steady,) = select(*scored, ties="lowest_variance").pairs
    assert (steady.chosen_id, steady.rejected_id) == ("p-c0", "p-c2"), "one score alone says nothing of its variance"
    picked = {select(*scored, seed=seed).pairs[0].rejected_id for seed in range(40)}
    assert picked == {"p-c2", "p-c3", "p-c4"}, "the default would not always agree with them"


def test_anchored_rejection_takes_the_anchors_worst() -> None:
    own = [(candidate(0), (4.0,)), (candidate(1), (1.0,)), (candidate(0, prompt="q"), (3.0,))]
    theirs = [(replace(candidate(5), id="p-a0"), (2.0,)), (replace(candidate(6), id="p-a1"), (3.0,))]
    selection = select(*own, anchors=prompts(*theirs))
    (pair,) = selection.pairs
    assert (pair.chosen_id, pair.rejected_id, pair.rejected_score) == ("p-c0", "p-a0", 2.0)
    assert selection.counts.too_few == 1, "q has no anchor"
    assert select(*own).pairs[0].rejected_id == "p-c1"
    better = [(replace(candidate(5), id="p-a0"), (4.5,))]
    assert select(*own[:2], anchors=prompts(*better)).counts.tied == 1, "an anchor above the best makes no pair"
    with pytest.raises(ValueError, match="anchors' prompt r is unknown"):
        select(*own, anchors=prompts((candidate(0, prompt="r"), (1.0,))))


def weighed(candidates: list[Candidate], now: list[Judgement], before: list[Judgement]) -> dict[str, float]:
    groups = scored_prompts(candidates, rewards_of(now, 1), rewards_of(before, 1))
    return {pair.id: pair.consistency for pair in pairs_of(groups, PairsConfig(consistency=True), 2, 0, PairCounter())}


def test_consistency_of_two_judges_by_hand() -> None:
    """Scores 1 2 3 4 against 1 2 4 3: five pairs alike, one not, tau 4 / 6, C = 5 / 6. A missing score leaves its
    candidate out."""
    candidates = [candidate(number) for number in range(4)]

    def judged(*scores: float | None) -> list[Judgement]:
        return [one for item, score in zip(candidates, scores, strict=True) for one in judgements(item, score)]

    now = judged(1.0, 2.0, 3.0, 4.0)
    assert weighed(candidates, now, judged(1.0, 2.0, 4.0, 3.0))["p-pair"] == pytest.approx(5 / 6)
    assert weighed(candidates, now, judged(4.0, 3.0, 2.0, 1.0))["p-pair"] == 0
    assert weighed(candidates, now, now)["p-pair"] == 1
    assert weighed(candidates, now, judged(1.0, 2.0, None, 4.0))["p-pair"] == 1
    assert weighed(candidates, now, judged(3.0, 3.0, 3.0, 3.0))["p-pair"] == 0.5
    assert weighed(candidates, now, [])["p-pair"] == 0.5


def test_a_prompt_without_a_pair_shifts_no_weight() -> None:
    """Three prompts, of which the middle one ties and makes no pair: the third keeps its own weight. Weights listed by
    prompt and zipped with pairs would give it the middle one's."""
    candidates, now, before = [], [], []
    for prompt, scores, earlier in (("a", (1, 2), (1, 2)), ("b", (3, 3), (1, 2)), ("c", (1, 2), (2, 1))):
        own = [candidate(number, prompt=prompt) for number in range(2)]
        candidates += own
        now += [one for item, score in zip(own, scores, strict=True) for one in judgements(item, float(score))]
        before += [one for item, score in zip(own, earlier, strict=True) for one in judgements(item, float(score))]
    assert weighed(candidates, now, before) == {"a-pair": 1.0, "c-pair": 0.0}


def test_what_is_counted_by_hand() -> None:
    """Scores 5 5 4 1: entropy 1/2 * 1 + 2 * 1/4 * 2 = 1.5 bits; gap 5 - 1; lengths 8 and 3."""
    scored = [
        (candidate(0, "a" * 8), (5.0, 5.0)),
        (candidate(1, "b" * 8), (4.0, None)),
        (candidate(2, "ccc"), (1.0,)),
        (candidate(3, "ccc"), ()),
    ]
    counts = select(*scored).counts
    assert counts.score_entropy == pytest.approx(1.5) and counts.duplicates == 1
    assert (counts.mean_gap, counts.mean_chosen_length, counts.mean_rejected_length) == (4, 8, 3)
    assert (counts.judgements, counts.unparsed, counts.mean_consistency) == (5, 1, 1)
    assert select((candidate(0), (None,))).counts.score_entropy == 0


Scores = st.lists(st.sampled_from([0.0, 1.0, 2.5, 5.0, None]), max_size=3)
Responses = st.tuples(st.sampled_from("abc"), st.sampled_from(["stop", "stop", "length"]), Scores)


@given(st.lists(st.lists(Responses, max_size=5), max_size=4), st.integers(0, 3))
def test_pairs_agree_with_brute_force(
    made: list[list[tuple[str, FinishReason, list[float | None]]]], seed: int
) -> None:
    scored, expected = [], {}
    for number, responses in enumerate(made):
        name = f"p{number}"
        means: list[tuple[float, str]] = []
        for index, (text, finish, scores) in enumerate(responses):
            scored.append((candidate(index, text, finish, name), tuple(scores)))
            valid = [score for score in scores if score is not None]
            if finish == "stop" and valid:
                means.append((sum(valid) / len(valid), text))
        if means:
            best, worst = max(means)[0], min(means)[0]
            texts = {(a, b) for mean, a in means if mean == best for other, b in means if other == worst and a != b}
            if best > worst and texts:
                expected[name] = (best, worst, texts)
    selection = select(*scored, seed=seed)
    assert [pair.id for pair in selection.pairs] == [f"{name}-pair" for name in expected]
    for pair, (best, worst, texts) in zip(selection.pairs, expected.values(), strict=True):
        assert (pair.chosen_score, pair.rejected_score) == pytest.approx((best, worst))
        assert (pair.chosen[0].content, pair.rejected[0].content) in texts
    counts = selection.counts
    assert counts.prompts == counts.pairs + counts.tied + counts.small_gap + counts.identical + counts.too_few
    assert counts.candidates == counts.scored + counts.truncated + counts.unscored


@given(
    st.lists(st.tuples(st.integers(0, 15), st.integers(1, 6)), min_size=2, max_size=6),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([None, 3]),
)
def test_every_pair_keeps_the_rules(
    thirds: list[tuple[int, int]], rho: float, min_gap: float, max_chosen_length: int | None
) -> None:
    """Scores in thirds and lengths, against the definition of length control."""
    scored = of_lengths(*((third / 3, length) for third, length in thirds))
    scores = [third / 3 for third, _ in thirds]
    best, worst = max(scores), min(scores)
    selection = select(*scored, rho=rho, min_gap=min_gap, max_chosen_length=max_chosen_length)
    lengths = {item.id: len(item.text) for item, _ in scored}
    for pair in selection.pairs:
        assert pair.chosen_score - pair.rejected_score > min_gap and pair.chosen[0] != pair.rejected[0]
        assert pair.chosen_score >= best - rho * (best - worst) - 1e-5
        assert pair.rejected_score <= worst + rho * (best - worst) + 1e-5
        assert max_chosen_length is None or lengths[pair.chosen_id] <= max_chosen_length
        if 0 < rho < 0.5 and min_gap == 0:
            allowed = [lengths[item.id] for item, (score,) in scored if score >= best - rho * (best - worst)]
            assert lengths[pair.chosen_id] <= min(allowed)
    if max_chosen_length is None:
        assert selection.counts.pairs == (best - worst > min_gap + 1e-5)
