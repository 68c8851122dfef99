"""Our AdamW is torch's, with its step in another place."""

import torch

from srlm_mega.training.adamw import AdamW


def train(optimizer_of: type[torch.optim.Optimizer], **extra: bool) -> list[torch.Tensor]:
    """Five steps of two parameter groups, a third one empty."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}, {"params": []}]
    optimizer = optimizer_of(groups, lr=0.1, weight_decay=0.2, betas=(0.9, 0.95), eps=1e-8, **extra)
    if isinstance(optimizer, AdamW):
        for param in params:
            optimizer.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
    for _ in range(5):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    if isinstance(optimizer, AdamW):
        assert [group["step"] for group in optimizer.param_groups] == [5, 5, 5]
    return [param.detach() for param in params]


def test_it_is_torchs_bit_by_bit() -> None:
    ours, torchs = train(AdamW, adam_w_mode=True), train(torch.optim.AdamW)
    assert all(torch.equal(one, other) for one, other in zip(ours, torchs, strict=True))


def test_another_adam_would_be_seen() -> None:
    """Negative control: weight decay that is not decoupled."""
    assert not torch.equal(train(AdamW, adam_w_mode=True)[0], train(torch.optim.Adam)[0])
