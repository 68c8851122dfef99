"""Global batches, cut for every rank."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srlm_mega.config.training import OptimizationConfig, PackNumber, ParallelConfig
from srlm_mega.training.batch import PairSequences, TokenSequence
from srlm_mega.training.packing import Pipelines, cut_into_packs, packs
from srlm_mega.training.split import batch_order, even_parts, num_steps, split, within
from srlm_mega.training.topology import Topology

ALONE = Topology(0, 1, torch.device("cpu"), 0, 1, 0, 1, 0, 1, ParallelConfig())


def section(**settings: int) -> OptimizationConfig:
    return OptimizationConfig(lr=1e-3, min_lr=1e-4, **{"global_batch_size": 16, "train_iters": 1} | settings)


def sequence(num_inputs: int) -> TokenSequence:
    return TokenSequence(f"s{num_inputs}", (1,) * (num_inputs + 1), 0)


def shares(items: list[TokenSequence], settings: OptimizationConfig, dp_size: int) -> list[list[list[int]]]:
    return [
        split(items, settings, replace(ALONE, dp_rank=rank, dp_size=dp_size)).micro_batches for rank in range(dp_size)
    ]


def test_even_parts_by_hand() -> None:
    assert even_parts(7, 2, 1) == [[0, 1], [2, 3], [4, 5], [6]]
    assert even_parts(7, 2, 3) == [[0, 1], [2], [3], [4], [5], [6]]
    assert even_parts(1, 4, 2) == [[0], []]


def test_packs_by_hand() -> None:
    """Largest first into the emptiest of two: 6 | 5, then 4 to 5, 3 to 6: 9 | 9."""
    assert packs([3, 6, 4, 5], capacity=9, multiple=1) == [[1, 0], [3, 2]]
    assert [len(part) for part in packs([1], capacity=9, multiple=2)] == [1, 0]


def test_a_pack_more_where_the_fewest_do_not_hold() -> None:
    """Three of 6 need 18 of 20 positions, but no two fit one pack of 10."""
    assert sorted(packs([6, 6, 6], capacity=10, multiple=1)) == [[0], [1], [2]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 90), st.sampled_from([1, 2, 3, 4]))
def test_every_item_is_in_one_pack(weights: list[int], capacity: int, multiple: int) -> None:
    made = packs(weights, capacity, multiple)
    assert sorted(place for part in made for place in part) == list(range(len(weights)))
    assert len(made) % multiple == 0
    loads = [sum(weights[place] for place in part) for part in made]
    assert loads == sorted(loads, reverse=True) and loads[0] <= capacity
    # LPT: no pack is above the average by more than the largest item.
    assert loads[0] <= sum(weights) / len(made) + max(weights)


def packed(number: PackNumber, capacity: int = 20_000) -> OptimizationConfig:
    return section(packed_sequence_size=capacity).model_copy(update={"packs": number})


@pytest.mark.parametrize(
    ("weights", "pipelines", "number"),
    [
        ([100] * 8, Pipelines(1, stages=4), 4),  # 7 * (200 + 256) positions' time; 8 of 100: 11 * 356
        ([1000] * 8, Pipelines(1, stages=4), 8),  # 11 * 1256; 4 of 2000: 7 * 2256
        ([1500, *[500] * 7], Pipelines(1, stages=4), 4),  # none is shorter than 1500, so more only take longer
        ([1000] * 8, Pipelines(2, stages=4), 8),  # four for each replica, all there are
        ([1000] * 8, Pipelines(1, stages=4, chunks=4), 4),  # 4.75 * 2256 = 10,716; 8 of 1000: 8.75 * 1256 = 10,990
        ([1000] * 8, Pipelines(1), 1),  # no pipeline to fill
        ([1000] * 2, Pipelines(1, stages=4), 2),  # never more than items
    ],
)
def test_as_many_packs_as_fill_the_pipeline(weights: list[int], pipelines: Pipelines, number: int) -> None:
    assert len(cut_into_packs(weights, packed("auto"), pipelines)) == number


def test_a_number_of_packs_for_each_replica() -> None:
    two = Pipelines(2, stages=2)
    assert len(cut_into_packs([10] * 8, packed(3), two)) == 6
    assert len(cut_into_packs([10] * 8, packed(99), two)) == 8, "never more than items"
    assert len(cut_into_packs([10] * 8, packed(1, capacity=20), two)) == 4, "more where they do not hold the items"
    interleaved = replace(two, chunks=2)  # whole groups of as many as there are stages
    assert [len(cut_into_packs([10] * 7, packed(number), interleaved)) for number in (3, "auto")] == [8, 4]
    assert len(cut_into_packs([10] * 8, packed("fewest"), two)) == 2
    assert section().packs == "fewest", "as older runs were cut"


@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=24), st.integers(900, 3000), st.sampled_from([1, 2, 3]),
    st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 3)]),
)  # fmt: skip
def test_no_other_number_of_packs_is_faster(
    weights: list[int], capacity: int, replicas: int, pipeline: tuple[int, int]
) -> None:
    """All numbers from one for each stage to one item each are tried in full."""
    pipelines = Pipelines(replicas, *pipeline)
    made = cut_into_packs(weights, packed("auto", capacity), pipelines)
    assert sorted(place for part in made for place in part) == list(range(len(weights)))
    assert len(made) % pipelines.multiple == 0

    def time(cut: list[list[int]]) -> float:
        return pipelines.positions(len(cut), max(sum(weights[place] for place in part) for part in cut))

    most = -(-len(weights) // pipelines.multiple) * pipelines.multiple
    assert min(most, replicas * pipelines.stages) <= len(made) <= most
    numbers = range(min(most, replicas * pipelines.stages), most + 1, pipelines.multiple)
    assert time(made) == min(time(packs(weights, capacity, pipelines.multiple, number)) for number in numbers)


@pytest.mark.parametrize("packed_sequence_size", [None, 64])
def test_ranks_share_every_item(packed_sequence_size: int | None) -> None:
    items = [sequence(length) for length in (3, 50, 7, 7, 20, 31, 8)]
    settings = section(micro_batch_size=2, packed_sequence_size=packed_sequence_size)
    for dp_size in (1, 2, 3):
        ranks = shares(items, settings, dp_size)
        assert len({len(rank) for rank in ranks}) == 1, "the same number of forward passes on every rank"
        assert sorted(place for rank in ranks for part in rank for place in part) == list(range(7))


def test_packs_are_balanced_over_ranks() -> None:
    items = [sequence(length) for length in (40, 30, 30, 20, 20, 10, 5, 5)]
    first, second = shares(items, section(packed_sequence_size=40), 2)
    assert [sum(items[place].num_inputs for place in part) for part in first] == [40, 40]
    assert [sum(items[place].num_inputs for place in part) for part in second] == [40, 40]


def test_shapes_by_hand() -> None:
    """Three sequences of 3, 9 and 17 inputs. Padded: two forward passes of 2 rows of 24; packed: one of 32."""
    items = [sequence(3), sequence(9), sequence(17)]
    padded = split(items, section(micro_batch_size=2), ALONE)
    assert (padded.num_rows, padded.length, padded.num_positions) == (2, 24, 2 * 2 * 24)
    packed = split(items, section(packed_sequence_size=40), ALONE)
    assert (packed.num_rows, packed.length, packed.num_positions) == (1, 32, 32)


def test_tensor_ranks_get_a_multiple_of_eight_each() -> None:
    assert split([sequence(9)], section(), replace(ALONE, tp_size=4)).length == 32
    assert split([sequence(33)], section(), replace(ALONE, tp_size=4)).length == 64


def test_an_interleaved_pipeline_gets_a_multiple_of_its_stages() -> None:
    interleaved = ParallelConfig(virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_size=4)
    made = split([sequence(9)], section(), replace(ALONE, pp_size=4, parallel=interleaved))
    assert made.micro_batches == [[0], [], [], []]


def test_both_sequences_of_a_pair_count() -> None:
    pair = PairSequences("p", sequence(3), sequence(4))
    assert split([pair], section(packed_sequence_size=40), ALONE).length == 8
    assert split([pair], section(), ALONE).num_rows == 2
    assert within([pair], 5) == [pair]
    assert within([pair], 4) == []


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


def test_steps() -> None:
    def of(**settings: int) -> OptimizationConfig:
        return OptimizationConfig(lr=1e-3, min_lr=1e-4, global_batch_size=16, **settings)

    assert num_steps(of(train_iters=7), 3) == 7
    assert num_steps(of(epochs=3), 100) == 18  # 300 / 16, the last partial batch dropped
    with pytest.raises(ValueError, match="15 items do not fill one batch of 16"):
        num_steps(of(epochs=1), 15)
    with pytest.raises(ValueError, match="0 items"):
        num_steps(of(train_iters=1), 0)


def test_items_that_are_too_long_are_said_to_be_so() -> None:
    all_long = "0 of 40 items .*: 40 are longer than model.seq_length .* Raise it, or give shorter texts"
    with pytest.raises(ValueError, match=all_long):
        num_steps(section(), 0, num_too_long=40)
    some = "15 of 40 items do not fill one batch of 16: 25 are longer than model.seq_length"
    with pytest.raises(ValueError, match=some):
        num_steps(OptimizationConfig(lr=1e-3, min_lr=1e-4, epochs=1), 15, num_too_long=25)


@pytest.mark.parametrize(
    ("changes", "length"),
    [({}, 16), ({"tp_size": 2}, 16), ({"cp_size": 4}, 32), ({"tp_size": 3}, 24), ({"length_multiple": 64}, 64)],
)
def test_lengths_are_multiples_of_what_ranks_hold(changes: dict[str, int], length: int) -> None:
    """9 input positions, in multiples of 8 for each rank, and of what FP8 asks for."""
    assert split([sequence(9)], section(), replace(ALONE, **changes)).length == length
