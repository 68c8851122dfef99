"""Sequences to forward passes, worked out by hand; what a GPU would not see is refused before it gets there."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from srlm_mega.config.training import DpoConfig, OptimizationConfig, ParallelConfig
from srlm_mega.kernels import ops
from srlm_mega.records import ReferenceLogprobs
from srlm_mega.training import batch as collator
from srlm_mega.training.batch import PairSequences, TokenSequence, context_part, packed_batch, padded_batch
from srlm_mega.training.dpo import DpoObjective
from srlm_mega.training.sft import SftObjective
from srlm_mega.training.topology import Topology

# A device whose tensors have no values that could be read: what is refused here was looked at on the CPU.
BLIND = Topology(0, 1, torch.device("meta"), 0, 1, 0, 1, 0, 1, ParallelConfig())
A, B = TokenSequence("a", (5, 6, 7, 8), 2), TokenSequence("b", (9, 4), 0)


def test_padded_by_hand() -> None:
    """Prompt 5 6, completion 7 8: 7 is predicted from 6 (position 1) and 8 from 7 (position 2). Three rows, so that
    position p of row r is row 3 p + r of Megatron's flattened [s, b, h]."""
    batch = padded_batch([A, B], 3, 4)
    assert batch.tokens.tolist() == [[5, 6, 7, 0], [9, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert batch.labels.tolist() == [[3, 6, 1], [7, 8, 4]]
    assert batch.cu_seqlens.tolist() == [0, 2, 3]
    assert batch.packed is None


def test_context_parallel_parts_by_hand() -> None:
    """Four positions on two ranks: rank 0 holds positions 0 and 3, rank 1 positions 1 and 2. Labels were rows 3, 6
    (positions 1 and 2 of row 0) and 1 (position 0 of row 1)."""
    first, second = (context_part(padded_batch([A, B], 3, 4), rank, 2) for rank in range(2))
    assert first.tokens.tolist() == [[5, 0], [9, 0], [0, 0]]
    assert first.position_ids.tolist() == [[0, 3]] * 3
    assert first.labels.tolist() == [[1], [4]]
    assert second.tokens.tolist() == [[6, 7], [0, 0], [0, 0]]
    assert second.position_ids.tolist() == [[1, 2]] * 3
    assert second.labels.tolist() == [[0, 3], [7, 8]]
    assert first.places is not None and second.places is not None
    assert (first.places.tolist(), second.places.tolist()) == ([1, 1, 0], [0, 1, 2])
    assert first.cu_seqlens.tolist() == second.cu_seqlens.tolist() == [0, 2, 3]


def test_packed_by_hand() -> None:
    """5 6 7, then 9, then padding, which is a sequence of its own."""
    batch = packed_batch([A, B], 6)
    assert batch.tokens.tolist() == [[5, 6, 7, 9, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.labels.tolist() == [[1, 2, 3], [7, 8, 4]]
    assert batch.cu_seqlens.tolist() == [0, 2, 3]
    assert batch.packed is not None
    assert batch.packed.cu_seqlens_q.tolist() == batch.packed.cu_seqlens_kv.tolist() == [0, 3, 4, 6]
    assert batch.packed.max_seqlen_q == batch.packed.max_seqlen_kv == 3


def test_a_full_pack_has_no_padding() -> None:
    batch = packed_batch([A, B], 4)
    assert batch.packed is not None
    assert batch.packed.cu_seqlens_q.tolist() == [0, 3, 4]


def test_nothing_to_learn_is_a_batch_too() -> None:
    """A rank that the global batch left without items still takes part in the schedule."""
    for batch in (padded_batch([], 2, 8), packed_batch([], 8)):
        assert batch.tokens.numel() in (8, 16) and batch.tokens.sum() == 0
        assert batch.labels.shape == (2, 0)
        assert batch.cu_seqlens.tolist() == [0]


def test_what_does_not_fit_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="do not fit 1 rows"):
        padded_batch([A, B], 1, 8)
    with pytest.raises(AssertionError, match="a: 3 inputs do not fit 2"):
        padded_batch([A], 1, 2)
    with pytest.raises(AssertionError, match="4 input positions, the row 3"):
        packed_batch([A, B], 3)


@pytest.mark.parametrize(("num_prompt", "counted"), [(0, 3), (1, 3), (2, 2), (3, 1)])
def test_targets_and_labels_agree(num_prompt: int, counted: int) -> None:
    sequence = TokenSequence("a", (5, 6, 7, 8), num_prompt)
    assert sequence.num_targets == len(sequence.targets) == counted
    assert padded_batch([sequence], 1, 8).labels.shape == (2, counted)


@pytest.mark.parametrize(("tokens", "num_prompt"), [((5, 6), 2), ((5,), 0), ((), 0)])
def test_empty_completion_names_the_id(tokens: tuple[int, ...], num_prompt: int) -> None:
    with pytest.raises(ValueError, match="example-7"):
        TokenSequence("example-7", tokens, num_prompt)


def test_a_pair_holds_both_its_sequences() -> None:
    assert PairSequences("p", A, B).sequences == (A, B)


class OnCuda(Tensor):
    """A tensor in the CPU's memory that says it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def sft(packed: bool, vocab_size: int = 10) -> SftObjective:
    section = OptimizationConfig(train_iters=1, lr=1e-3, min_lr=0, packed_sequence_size=8 if packed else None)
    return SftObjective([A, B], section, BLIND, vocab_size)


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_out_of_range_is_caught_on_the_way_to_the_gpu(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sft(packed).prepare([0, 1])

    def shifted(sequences: Sequence[TokenSequence], starts: Sequence[int], stride: int) -> Tensor:
        return labels(sequences, starts, stride) + torch.tensor([[32], [0]])

    labels = collator.labels
    monkeypatch.setattr(collator, "labels", shifted)
    with pytest.raises(ValueError, match="rows: got row"):
        sft(packed).prepare([0, 1])


def test_there_the_kernels_would_not_have_seen_it() -> None:
    """The check of `ops` names the row; on a GPU it reads no values, so the row is used, here by PyTorch's indexing."""
    hidden, weight, target, rows = torch.ones(4, 3), torch.ones(6, 3), torch.tensor([0]), torch.tensor([4])
    with pytest.raises(ValueError, match="rows: got row"):
        ops.vp_linear_logprob(hidden, weight, target, rows, vocab_start=0, tp_group=None)
    with pytest.raises(IndexError):
        ops.vp_linear_logprob(hidden, weight, target, rows.as_subclass(OnCuda), vocab_start=0, tp_group=None)


@pytest.mark.parametrize("packed", [False, True])
def test_a_token_outside_the_vocabulary_is_caught_too(packed: bool) -> None:
    sft(packed, vocab_size=9).prepare([0])
    with pytest.raises(ValueError, match=r"target: got token \[8\], expected 0 to 7"):
        sft(packed, vocab_size=8).prepare([0])


def test_a_consistency_outside_0_to_1_is_caught_too() -> None:
    section = DpoConfig(train_iters=1, lr=1e-3, min_lr=0)
    pairs = [PairSequences("a", A, A, 0.5), PairSequences("b", A, A, -0.5)]
    reference = [ReferenceLogprobs("a", 0.0, 0.0), ReferenceLogprobs("b", 0.0, 0.0)]
    objective = DpoObjective(pairs, reference, section, BLIND, 10, tolerance=None)
    objective.prepare([0])
    with pytest.raises(ValueError, match=r"consistency: got \[-0.5\], expected shares from 0 to 1"):
        objective.prepare([1])
