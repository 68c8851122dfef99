"""One global batch has one loss and one gradient, however it is cut: micro batch sizes, replicas, packing.

All replicas' micro batches are run by one process: what they add up to is what is compared.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from megatron.core.transformer.module import MegatronModule
from small_run import SEED, Layout, config
from torch import Tensor

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.config.training import DpoConfig, OptimizationConfig, PackNumber
from srlm_mega.records import ReferenceLogprobs
from srlm_mega.training.attention_sdpa import PackedSequences
from srlm_mega.training.batch import Batch, PairSequences, TokenSequence
from srlm_mega.training.dpo import DpoObjective
from srlm_mega.training.model import build_model, transformer_config, wrap_data_parallel
from srlm_mega.training.schedule import Loss, MicroBatch, Step, forward_backward
from srlm_mega.training.sft import SftObjective
from srlm_mega.training.split import num_inputs
from srlm_mega.training.topology import Topology

pytestmark = pytest.mark.slow
SHAPE = LlamaShape(
    num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2,
    vocab_size=32, max_position_embeddings=64, norm_epsilon=1e-5, rotary_base=10000.0, tie_word_embeddings=False,
)  # fmt: skip
TOLERANCE = 2e-5  # of the largest gradient: fp32 sums in another order
# A prompt of 1 to 3 tokens and a response of 1 to 20.
LENGTHS = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))
# Micro batch size, replicas, packs (None: padded rows): 5 replicas hardly ever divide the batch, and may outnumber it.
Cut = tuple[int, int, PackNumber | None]
CUTS: list[Cut] = [
    (1, 1, None), (3, 1, None), (4, 2, None), (1, 5, None), (1, 1, "fewest"), (1, 2, "auto"), (1, 5, 2), (1, 1, "auto"),
]  # fmt: skip
STAGES = 3  # that "auto" fills


@dataclass(frozen=True)
class World:
    """A model that is small enough to be run many times."""

    topology: Topology
    model: list[MegatronModule]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    run = config(Layout(""), 1)
    with Topology.start(run.parallel, run.trainer, SEED) as topology:
        model_config = transformer_config(SHAPE, run.sft, run, topology)
        model = wrap_data_parallel(build_model(model_config, SHAPE, topology), model_config, topology)
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.data.normal_(std=0.3)
        yield World(topology, model)


def items_of(lengths: Sequence[tuple[int, int, int]]) -> list[PairSequences]:
    torch.manual_seed(len(lengths))

    def sequence(name: str, num_prompt: int, num_response: int) -> TokenSequence:
        return TokenSequence(name, tuple(torch.randint(32, (num_prompt + num_response,)).tolist()), num_prompt)

    return [
        PairSequences(f"p{number}", sequence("c", prompt, chosen), sequence("r", prompt, rejected))
        for number, (prompt, chosen, rejected) in enumerate(lengths)
    ]


def sft(pairs: Sequence[PairSequences], section: OptimizationConfig, topology: Topology) -> SftObjective:
    return SftObjective([pair.chosen for pair in pairs], section, topology, 32)


def dpo(pairs: Sequence[PairSequences], section: OptimizationConfig, topology: Topology) -> DpoObjective:
    """References of a model that is not the policy, so that margins differ from 0."""
    reference = [ReferenceLogprobs(pair.id, -3.0 - number, -5.0) for number, pair in enumerate(pairs)]
    settings = section.model_dump() | {"rpo_alpha": 0.3, "loss_type": "sigmoid", "label_smoothing": 0.1}
    return DpoObjective(pairs, reference, DpoConfig.model_validate(settings), topology, 32, tolerance=None)


def weighed(pairs: Sequence[PairSequences], section: OptimizationConfig, topology: Topology) -> DpoObjective:
    """Pairs with consistencies of their own: if they met other pairs, another cut would give another loss. They are
    below 1/4, because near 1/2 a pair's gradient is the difference of two equal numbers, all rounding."""
    own = [replace(pair, consistency=0.05 * (number % 5)) for number, pair in enumerate(pairs)]
    reference = [ReferenceLogprobs(pair.id, -3.0 - number, -5.0) for number, pair in enumerate(pairs)]
    return DpoObjective(own, reference, DpoConfig.model_validate(section.model_dump()), topology, 32, tolerance=None)


Make = Callable[[Sequence[PairSequences], OptimizationConfig, Topology], SftObjective | DpoObjective]
Change = Callable[[MicroBatch], MicroBatch]


def loss_and_gradient(
    world: World,
    make: Make,
    pairs: Sequence[PairSequences],
    cut: Cut,
    change: Change = lambda micro_batch: micro_batch,
) -> tuple[float, Tensor]:
    """Of the global batch of all pairs, cut for every replica; `change` spoils the micro batches."""
    micro_batch_size, dp_size, number = cut
    section = OptimizationConfig(
        train_iters=1,
        lr=1e-3,
        min_lr=0,
        global_batch_size=len(pairs),
        micro_batch_size=micro_batch_size,
        packed_sequence_size=None if number is None else max(num_inputs(pair) for pair in pairs) * 3 + 3,
        packs=number or "fewest",
        attention_dropout=0,
        hidden_dropout=0,
    )
    ranks = [replace(world.topology, dp_rank=rank, dp_size=dp_size, pp_size=STAGES) for rank in range(dp_size)]
    objectives = [make(pairs, section, rank) for rank in ranks]
    steps = [objective.prepare(range(len(pairs))) for objective in objectives]
    step = Step(
        [change(micro_batch) for each in steps for micro_batch in each.micro_batches],
        steps[0].lengths,
        steps[0].num_positions,
    )
    for chunk in world.model:
        chunk.zero_grad_buffer()
    sums = forward_backward(world.model, step, objectives[0].num_sums, world.topology)
    gradient = torch.cat([weight.main_grad.flatten().clone() for chunk in world.model for weight in chunk.parameters()])
    return objectives[0].metrics(sums)["loss"], gradient


def distance(got: tuple[float, Tensor], want: tuple[float, Tensor]) -> float:
    """Largest difference, of the loss as of any gradient, as a share of the loss and of the largest gradient."""
    gradients = (got[1] - want[1]).abs().max() / want[1].abs().max()
    return max(abs(got[0] - want[0]) / abs(want[0]), float(gradients))


@pytest.mark.parametrize("make", [sft, dpo, weighed])
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=9))
@example(lengths=[(1, 1, 1)])
@example(lengths=[(2, 1, 20), (1, 20, 1), (3, 7, 7), (1, 1, 1), (2, 13, 5)])
def test_the_cut_does_not_matter(world: World, make: Make, lengths: list[tuple[int, int, int]]) -> None:
    pairs = items_of(lengths)
    want = loss_and_gradient(world, make, pairs, CUTS[0])
    for cut in CUTS[1:]:
        assert distance(loss_and_gradient(world, make, pairs, cut), want) < TOLERANCE, cut


@dataclass(frozen=True)
class Spoilt:
    """A micro batch whose input or loss was changed."""

    batch: Batch
    loss: Callable[[Tensor], Loss]


def mean_of_micro_batch(micro_batch: MicroBatch) -> MicroBatch:
    """The peers' mistake: means of micro batches are averaged."""

    def loss(logps: Tensor) -> Loss:
        total, count, reported = micro_batch.loss(logps)
        return total / count, count.clamp(max=1), reported

    return Spoilt(micro_batch.batch, loss)


def shifted(micro_batch: MicroBatch) -> MicroBatch:
    """Each target is predicted from one position too late, where it can be seen."""
    rows, tokens = micro_batch.batch.labels
    labels = torch.stack([rows + len(micro_batch.batch.tokens), tokens])
    return Spoilt(replace(micro_batch.batch, labels=labels), micro_batch.loss)


def one_document(micro_batch: MicroBatch) -> MicroBatch:
    """Packed sequences see each other."""
    length = micro_batch.batch.tokens.numel()
    return Spoilt(replace(micro_batch.batch, packed=PackedSequences.of([length])), micro_batch.loss)


@pytest.mark.parametrize("make", [sft, dpo])
@pytest.mark.parametrize(
    ("change", "cut"),
    [(mean_of_micro_batch, (3, 1, None)), (shifted, (3, 1, None)), (one_document, (1, 1, "fewest"))],
)
def test_mistakes_would_be_seen(world: World, make: Make, change: Change, cut: Cut) -> None:
    pairs = items_of([(2, 3, 20), (1, 20, 5), (3, 7, 7), (2, 13, 5), (1, 1, 1)])
    want = loss_and_gradient(world, make, pairs, CUTS[0])
    assert distance(loss_and_gradient(world, make, pairs, cut), want) < TOLERANCE
    assert distance(loss_and_gradient(world, make, pairs, cut, change), want) > 100 * TOLERANCE
