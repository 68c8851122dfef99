"""The DPO heads that `srlm bench kernels` compares: from hidden states and the vocabulary's matrix to the loss.

All compute the sigmoid loss with beta 0.1 and a reference of 0, the only one that Liger's head accepts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn import functional as F

from srlm_mega.errors import UserError
from srlm_mega.kernels import ops, reference
from srlm_mega.kernels.checks import IGNORE_INDEX
from srlm_mega.run.provenance import package_version

BETA = 0.1
Provider = Literal["ours-save", "ours-recompute", "eager", "torch.compile", "liger"]
PROVIDERS: tuple[Provider, ...] = ("ours-save", "ours-recompute", "eager", "torch.compile", "liger")
LIGER = Version("0.8.5")  # the oldest that is a baseline
Head = Callable[[Tensor, Tensor], Tensor]  # hidden [T, H], weight [V, H] -> loss


@dataclass(frozen=True)
class HeadShape:
    """2P sequences of equal length, chosen ones first; the last part of each is completion."""

    name: str
    num_pairs: int
    sequence_length: int
    hidden_size: int
    vocab_size: int  # of one rank
    completion_fraction: float = 1.0

    @property
    def num_positions(self) -> int:
        """T: all positions of all sequences."""
        return 2 * self.num_pairs * self.sequence_length

    @property
    def completion_length(self) -> int:
        """Positions of a sequence that have to be computed."""
        return round(self.sequence_length * self.completion_fraction)

    @property
    def num_rows(self) -> int:
        """N: positions of all sequences that have to be computed."""
        return 2 * self.num_pairs * self.completion_length


@dataclass(frozen=True)
class HeadBatch:
    """A head's inputs without hidden states and weight."""

    shape: HeadShape
    labels: Tensor  # [2P, S], -100 outside the completions
    rows: Tensor  # [N]
    cu_seqlens: Tensor  # [2P + 1]
    pairs: Tensor  # [P, 2]
    ref_logp: Tensor  # [2P]


def make_batch(shape: HeadShape, device: torch.device) -> HeadBatch:
    """Make random labels; rows and bounds on the CPU, as a collator makes them."""
    generator = torch.Generator().manual_seed(0)
    num_sequences, length = 2 * shape.num_pairs, shape.sequence_length
    labels = torch.randint(shape.vocab_size, (num_sequences, length), generator=generator)
    labels[:, : length - shape.completion_length] = IGNORE_INDEX
    rows = torch.arange(shape.num_positions)[labels.flatten() != IGNORE_INDEX]
    bounds = torch.arange(num_sequences + 1) * shape.completion_length
    pairs = torch.arange(num_sequences).view(2, shape.num_pairs).T.contiguous()
    zeros = torch.zeros(num_sequences)
    return HeadBatch(shape, *(tensor.to(device) for tensor in (labels, rows, bounds.int(), pairs, zeros)))


def make_inputs(shape: HeadShape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make hidden states [T, H] and a weight [V, H] whose logits have a standard deviation of 2."""
    generator = torch.Generator(device).manual_seed(1)
    hidden = torch.randn(shape.num_positions, shape.hidden_size, generator=generator, device=device)
    weight = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator, device=device)
    hidden = (hidden * 2 / shape.hidden_size**0.5).to(dtype)
    return hidden.requires_grad_(), weight.to(dtype).requires_grad_()


def make_head(provider: Provider, batch: HeadBatch) -> Head:
    """Return the provider's head for one batch."""
    match provider:
        case "ours-save":
            return lambda hidden, weight: our_loss(hidden, weight, batch, "exp")
        case "ours-recompute":
            return lambda hidden, weight: our_loss(hidden, weight, batch, "recompute")
        case "eager":
            return lambda hidden, weight: eager_loss(hidden, weight, batch.labels)
        case "torch.compile":
            torch.compiler.reset()  # every shape is compiled alone, never for sizes that change
            compiled = torch.compile(eager_loss, dynamic=False)
            return lambda hidden, weight: compiled(hidden, weight, batch.labels)
        case "liger":
            return liger_head(batch)


def our_loss(hidden: Tensor, weight: Tensor, batch: HeadBatch, save: ops.Save) -> Tensor:
    """Return the loss by this project's head: only completion rows, no [T, V] logits."""
    all_rows = batch.shape.completion_fraction == 1
    rows = None if all_rows else batch.rows
    target = batch.labels.flatten() if all_rows else batch.labels.flatten()[batch.rows]
    logp = ops.vp_linear_logprob(hidden, weight, target, rows, vocab_start=0, tp_group=None, save=save)
    return our_dpo_loss(logp, batch) / batch.shape.num_pairs


def our_dpo_loss(logp: Tensor, batch: HeadBatch) -> Tensor:
    """Return this project's loss of the completion rows' log p [N], summed over pairs."""
    return ops.dpo_loss(logp, batch.cu_seqlens, batch.pairs, batch.ref_logp, ops.DpoSettings(BETA)).loss


def eager_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the loss by PyTorch as it is commonly written: logits of every position, log softmax in fp32, a mask."""
    logp = -F.cross_entropy(F.linear(hidden, weight).float(), labels.flatten(), reduction="none")
    chosen, rejected = logp.view(labels.shape).sum(1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def liger_head(batch: HeadBatch) -> Head:
    """Return Liger's fused linear DPO loss, a pair at a time (its default); compiled on CUDA, as it is by default.
    UserError when the installed version is too old to be a baseline."""
    installed = package_version("liger-kernel")
    if installed is None or Version(installed) < LIGER:
        raise UserError(
            f"liger-kernel {installed} is older than the baseline of this benchmark, {LIGER}: "
            f"pip install 'liger-kernel>={LIGER}', or measure without it: pip uninstall liger-kernel"
        )
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    head = LigerFusedLinearDPOLoss(beta=BETA, compiled=batch.labels.is_cuda, use_ref_model=False)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = head(weight, hidden.view(*batch.labels.shape, -1), batch.labels)[0]
        return value

    return loss


def true_loss(hidden: Tensor, weight: Tensor, batch: HeadBatch) -> Tensor:
    """Return the loss by the reference, for inputs in fp64."""
    labels = batch.labels.flatten()
    logp = reference.vp_linear_logprob(
        hidden, weight, labels[batch.rows], batch.rows, vocab_start=0, tp_group=None, sequence_parallel=False
    )
    out = reference.dpo_loss(logp, batch.cu_seqlens, batch.pairs, batch.ref_logp, ops.DpoSettings(BETA))
    return out.loss / batch.shape.num_pairs
