"""Batches of token ids for one forward pass: padded rows, or one packed row, of the same shape on every rank.

The positions that the head computes, and each sequence's tokens among them, are determined here on the CPU, so that
the host never waits for the GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srlm_mega.errors import UserError
from srlm_mega.kernels import checks
from srlm_mega.training.attention_sdpa import PackedSequences
from srlm_mega.training.context_parallel import cp_positions


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token ids of which `tokens[num_prompt:]` are trained on. With `num_prompt` 0 or 1 every predicted token is."""

    id: str
    tokens: tuple[int, ...]
    num_prompt: int

    def __post_init__(self) -> None:
        if self.num_targets < 1:
            raise UserError(
                f"{self.id}: nothing to train on, {len(self.tokens)} tokens of which {self.num_prompt} are the prompt: "
                "remove this empty completion"
            )

    @property
    def num_inputs(self) -> int:
        """Number of input positions. The last token is only predicted."""
        return len(self.tokens) - 1

    @property
    def num_targets(self) -> int:
        """Number of tokens that enter the loss. The first token has nothing before it to be predicted from."""
        return len(self.tokens) - max(self.num_prompt, 1)

    @property
    def targets(self) -> tuple[int, ...]:
        """The tokens that enter the loss."""
        return self.tokens[-self.num_targets :]

    @property
    def sequences(self) -> tuple["TokenSequence", ...]:
        """The sequence alone: what must be in one forward pass."""
        return (self,)


@dataclass(frozen=True, slots=True)
class PairSequences:
    """Two completions of one prompt, as token ids; `consistency` is that of `records.PreferencePair`."""

    id: str
    chosen: TokenSequence
    rejected: TokenSequence
    consistency: float = 1.0

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        """Chosen and rejected: a pair is never split over forward passes."""
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass of S sequences. Megatron's hidden states are [s, b, h]; the head computes N rows.

    tokens, position_ids  [b, s]: padded rows, or (packed) b = 1 and positions that restart with every sequence
    labels                [2, N]: the rows (of the flattened [s * b, h]) from which targets are predicted; the targets
    cu_seqlens            [S + 1]: sequence i's tokens are labels[:, cu_seqlens[i] : cu_seqlens[i + 1]]
    packed                bounds of the sequences on the packed row, of which padding is the last; None: padded rows
    places                None, or [N] under context parallelism, where `tokens`, `position_ids` and `labels` have only
                          this rank's positions: each label's place in `labels`, their number where it is elsewhere
    """

    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    packed: PackedSequences | None
    places: Tensor | None = None

    def to(self, device: torch.device, vocab_size: int) -> "Batch":
        """Return the batch on `device`. ValueError for labels that are not its rows, or not tokens of the vocabulary:
        the batch is still on the CPU, and on a GPU values are never read."""
        rows, tokens = self.labels
        checks.check_rows(rows, self.tokens.numel())
        checks.check_targets(tokens, vocab_size)
        checks.check_segments(self.cu_seqlens, len(tokens if self.places is None else self.places))
        return Batch(
            tokens=self.tokens.to(device),
            position_ids=self.position_ids.to(device),
            labels=self.labels.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            packed=None if self.packed is None else PackedSequences.of(self.packed.lengths, device),
            places=None if self.places is None else self.places.to(device),
        )


def padded_batch(sequences: Sequence[TokenSequence], num_rows: int, length: int) -> Batch:
    """Return one row per sequence, padded on the right to `length` input positions; rows left over are padding.

    With causal attention no real token sees the padding behind it.
    """
    assert len(sequences) <= num_rows, f"{len(sequences)} sequences do not fit {num_rows} rows"
    tokens = torch.zeros(num_rows, length, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        assert sequence.num_inputs <= length, f"{sequence.id}: {sequence.num_inputs} inputs do not fit {length}"
        tokens[row, : sequence.num_inputs] = torch.tensor(sequence.tokens[:-1])
    return Batch(
        tokens=tokens,
        position_ids=torch.arange(length).repeat(num_rows, 1),
        labels=labels(sequences, starts=range(len(sequences)), stride=num_rows),
        cu_seqlens=bounds([sequence.num_targets for sequence in sequences]),
        packed=None,
    )


def context_part(batch: Batch, cp_rank: int, cp_size: int) -> Batch:
    """Return one context-parallel rank's part of padded rows."""
    assert batch.packed is None, "the configuration refuses packing under context parallelism"
    num_rows, length = batch.tokens.shape
    positions = cp_positions(length, cp_rank, cp_size)
    place = torch.full((length, num_rows), -1)  # each row's number in this rank's hidden states; -1: not here
    place[positions] = torch.arange(len(positions) * num_rows).view(-1, num_rows)
    rows, tokens = batch.labels
    own = place.flatten()[rows] >= 0
    return replace(
        batch,
        tokens=batch.tokens[:, positions],
        position_ids=batch.position_ids[:, positions],
        labels=torch.stack([place.flatten()[rows][own], tokens[own]]),
        places=torch.where(own, own.cumsum(0) - 1, own.sum()),
    )


def packed_batch(sequences: Sequence[TokenSequence], length: int) -> Batch:
    """Return all sequences on one row of `length` input positions, one after another and then one of padding."""
    inputs = [sequence.num_inputs for sequence in sequences]
    padding = length - sum(inputs)
    assert padding >= 0, f"{len(sequences)} sequences have {sum(inputs)} input positions, the row {length}"
    segments = [*inputs, padding] if padding else inputs
    flat = [token for sequence in sequences for token in sequence.tokens[:-1]]
    return Batch(
        tokens=torch.tensor([flat + [0] * padding]),
        position_ids=torch.cat([torch.arange(segment) for segment in segments])[None],
        labels=labels(sequences, starts=bounds(segments).tolist(), stride=1),
        cu_seqlens=bounds([sequence.num_targets for sequence in sequences]),
        packed=PackedSequences.of(segments),
    )


def labels(sequences: Sequence[TokenSequence], starts: Sequence[int], stride: int) -> Tensor:
    """Return rows and tokens of all targets [2, N]. Position p of sequence i is row `starts[i] + stride * p`; it
    predicts the token at p + 1."""
    rows = [
        torch.arange(sequence.num_inputs - sequence.num_targets, sequence.num_inputs) * stride + start
        for sequence, start in zip(sequences, starts, strict=False)
    ]
    tokens = [torch.tensor(sequence.targets) for sequence in sequences]
    empty = torch.zeros(0, dtype=torch.long)
    return torch.stack([torch.cat([empty, *rows]), torch.cat([empty, *tokens])])


def bounds(lengths: Sequence[int]) -> Tensor:
    """Return the bounds [n + 1] of n consecutive parts with these lengths: 0, ..., their sum."""
    return torch.tensor([0, *lengths]).cumsum(0)
