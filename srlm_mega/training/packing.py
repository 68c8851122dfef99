"""How many packs a global batch becomes, and which items are in each: arithmetic alone, which the planner shares."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from srlm_mega.config.training import OptimizationConfig

LENGTH_MULTIPLE = 8  # of a rank's positions, for tensor cores; FP8 needs more
# What a micro batch costs beside its positions, counted in positions: weights are read, their gradients added to, and
# kernels started, however short it is. By the planner's factors 190 to 260 on an H100 (7B, 70B), 260 to 420 on a B200.
FIXED_POSITIONS = 256


@dataclass(frozen=True)
class Pipelines:
    """The replicas that share a global batch: how many, and the stages of each and the model chunks of a stage."""

    replicas: int
    stages: int = 1
    chunks: int = 1

    @property
    def multiple(self) -> int:
        """What the number of micro batches, of all replicas, must be a multiple of. Megatron's interleaved schedule
        takes whole groups of as many as there are stages."""
        return self.replicas * (self.stages if self.chunks > 1 else 1)

    def positions(self, number: int, length: float) -> float:
        """Return in how many positions' time they get through `number` micro batches of `length`: every replica takes
        its own, and waits until its pipeline has filled and drained."""
        return (number / self.replicas + (self.stages - 1) / self.chunks) * (length + FIXED_POSITIONS)


def number_of_parts(num_items: int, size: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is enough parts of `size` items."""
    return -(-num_items // (size * multiple)) * multiple


def cut_into_packs(weights: Sequence[int], section: OptimizationConfig, pipelines: Pipelines) -> list[list[int]]:
    """Split a global batch of items of these weights, in input positions, into as many packs as `section.packs` says.
    The fullest comes first: dealt out to replicas in turn, packs also balance these."""
    assert section.packed_sequence_size is not None, "the batch is not packed"
    capacity, multiple, replicas = section.packed_sequence_size, pipelines.multiple, pipelines.replicas
    most = number_of_parts(len(weights), 1, multiple)
    match section.packs:
        case "fewest":
            return packs(weights, capacity, multiple)
        case "auto":
            least = min(most, pipelines.stages * replicas)
            return fastest_packs(weights, capacity, pipelines, range(least, most + 1, multiple))
        case number:
            return packs(weights, capacity, multiple, at_least=min(most, number * replicas))


def fastest_packs(
    weights: Sequence[int], capacity: int, pipelines: Pipelines, numbers: Sequence[int]
) -> list[list[int]]:
    """Split items into the number of packs, of these, by which pipelines take least time. All packs take as long as the
    fullest one: few packs leave the pipeline empty, many are no shorter than the longest item."""
    made, least = list[list[int]](), math.inf
    for number in numbers:
        if pipelines.positions(number, max(max(weights), sum(weights) / number)) < least:  # no cut can be faster
            tried = packs(weights, capacity, pipelines.multiple, at_least=number)
            time = pipelines.positions(len(tried), sum(weights[place] for place in tried[0]))
            made, least = (tried, time) if time < least else (made, least)
    return made


def packs(weights: Sequence[int], capacity: int, multiple: int, at_least: int = 1) -> list[list[int]]:
    """Split items of these weights into the fewest packs, a multiple of `multiple`, of at most `capacity` each.

    The largest item goes first, each into the emptiest pack (Graham's LPT rule), so that packs are nearly equal. The
    fullest pack comes first.
    """
    assert max(weights) <= capacity, f"an item of {max(weights)} positions does not fit a pack of {capacity}"
    largest_first = sorted(range(len(weights)), key=lambda place: -weights[place])
    num_packs = -(-max(at_least, -(-sum(weights) // capacity)) // multiple) * multiple
    while True:
        made: list[list[int]] = [[] for _ in range(num_packs)]
        loads = [(0, number) for number in range(num_packs)]
        for place in largest_first:
            load, emptiest = loads[0]
            made[emptiest].append(place)
            heapq.heapreplace(loads, (load + weights[place], emptiest))
        if max(loads)[0] <= capacity:
            return [made[number] for load, number in sorted(loads, key=lambda pack: (-pack[0], pack[1]))]
        num_packs += multiple
