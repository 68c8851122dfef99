"""The mathematics of the DPO head in plain PyTorch: the definition that anything faster is measured against."""

from torch import Tensor
from torch.nn import functional as F


def sequence_logps(token_nll: Tensor, loss_mask: Tensor) -> Tensor:
    """Summed log p of each response, end token included: [b, s], [b, s] -> [b]. Sums, never means."""
    return -(token_nll * loss_mask).sum(-1)


def dpo_margins(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """(log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-)) of each pair: four [b] -> [b]."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def dpo_loss(margins: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta * margin) of each pair (Rafailov et al. 2023, equation 7): [b] -> [b]."""
    return -F.logsigmoid(beta * margins)
