"""Sequences to padded batches, worked out by hand."""

from collections import Counter

import pytest
import torch

from srlm_mega.config import TrainingConfig
from srlm_mega.training.batch import (
    PairSequences,
    TokenSequence,
    batch_order,
    collate,
    num_steps,
    own_share,
    padded_length,
    within,
)

CPU = torch.device("cpu")


def test_collate_by_hand() -> None:
    """Prompt 5 6, completion 7 8: 7 is predicted from 6 and 8 from 7."""
    batch = collate([TokenSequence("a", (5, 6, 7, 8), 2), TokenSequence("b", (9, 4), 0)], 4, CPU)
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, 8, 0], [4, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize(("num_prompt", "counted"), [(0, 3), (1, 3), (2, 2), (3, 1)])
def test_targets_and_mask_agree(num_prompt: int, counted: int) -> None:
    sequence = TokenSequence("a", (5, 6, 7, 8), num_prompt)
    assert sequence.num_targets == counted
    assert collate([sequence], 8, CPU).loss_mask.sum() == counted


@pytest.mark.parametrize(("tokens", "num_prompt"), [((5, 6), 2), ((5,), 0), ((), 0)])
def test_empty_completion_names_the_id(tokens: tuple[int, ...], num_prompt: int) -> None:
    with pytest.raises(ValueError, match="example-7"):
        TokenSequence("example-7", tokens, num_prompt)


@pytest.mark.parametrize(
    ("tokens", "tp_size", "length"), [(9, 1, 8), (10, 1, 16), (2, 1, 8), (10, 16, 16), (18, 16, 32), (9, 3, 24)]
)
def test_padded_length(tokens: int, tp_size: int, length: int) -> None:
    """One position less than tokens, a multiple of 8 and of TP."""
    assert padded_length([TokenSequence("a", (1,) * tokens, 0), TokenSequence("b", (1, 1), 0)], tp_size) == length


def test_a_pair_is_as_long_as_its_longer_side() -> None:
    pair = PairSequences("p", TokenSequence("c", (1, 2, 3), 1), TokenSequence("r", (1, 2, 3, 4), 1))
    assert pair.longest == 4
    assert within([pair], 4) == [pair]
    assert within([pair], 3) == []


def test_order_passes_over_everything_and_reshuffles() -> None:
    order = batch_order(num_items=6, batch_size=4, seed=3)
    batches = [next(order) for _ in range(3)]
    numbers = [number for batch in batches for number in batch]
    assert Counter(numbers) == Counter([0, 1, 2, 3, 4, 5] * 2)
    assert sorted(numbers[:6]) == [0, 1, 2, 3, 4, 5]
    assert numbers[:6] != numbers[6:]


def test_order_depends_on_the_seed_alone() -> None:
    def first(seed: int) -> list[int]:
        return next(batch_order(100, 50, seed))

    assert first(3) == first(3)
    assert first(3) != first(4)


def test_batches_larger_than_the_data() -> None:
    assert Counter(next(batch_order(2, 5, 0))) in (Counter({0: 3, 1: 2}), Counter({0: 2, 1: 3}))


def test_shares_make_up_the_batch() -> None:
    shares = [own_share(range(12), dp_rank, 2, 3) for dp_rank in range(2)]
    assert [[list(share) for share in rank] for rank in shares] == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


def test_a_batch_that_does_not_split_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="12"):
        own_share(range(12), 0, 2, 4)


def section(**settings: int) -> TrainingConfig:
    return TrainingConfig(lr=1e-3, min_lr=1e-4, global_batch_size=16, **settings)


def test_steps() -> None:
    assert num_steps(section(train_iters=7), 3) == 7
    assert num_steps(section(epochs=3), 100) == 18  # 300 / 16, the last partial batch dropped
    with pytest.raises(ValueError, match="15 items do not fill one batch of 16"):
        num_steps(section(epochs=1), 15)
    with pytest.raises(ValueError, match="0 items"):
        num_steps(section(train_iters=1), 0)
