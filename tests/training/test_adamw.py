"""Our AdamW is torch's, with its step in another place; the norm is Megatron's, without its reads."""

import pytest
import torch
from megatron.core.utils import local_multi_tensor_l2_norm
from operators import READ, Operators

from srlm_mega.training import adamw
from srlm_mega.training.adamw import AdamW, total_norm


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


@pytest.mark.parametrize("megatron_core_0_19", [{}, {"capturable": False}])
def test_it_is_torchs_bit_by_bit(megatron_core_0_19: dict[str, bool]) -> None:
    ours, torchs = train(AdamW, adam_w_mode=True, **megatron_core_0_19), train(torch.optim.AdamW)
    assert all(torch.equal(one, other) for one, other in zip(ours, torchs, strict=True))


def test_another_adam_would_be_seen() -> None:
    """Negative control: weight decay that is not decoupled."""
    assert not torch.equal(train(AdamW, adam_w_mode=True)[0], train(torch.optim.Adam)[0])


def test_on_a_gpu_one_kernel_updates_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused road, which torch has on the CPU too: the same up to rounding, and no step is read or copied."""
    plain = train(AdamW, adam_w_mode=True)
    monkeypatch.setattr(adamw, "fusible", lambda params: True)
    with Operators() as fused_calls:
        fused = train(AdamW, adam_w_mode=True)
    # Parameters stay below 4, where decay and update round by an eps each; the update, below 0.2, by some 10 eps of it.
    torch.testing.assert_close(fused, plain, rtol=0, atol=5 * (2 + 2) * torch.finfo(torch.float32).eps)
    assert fused_calls.names.count("_fused_adamw_") == 5 * 2, "once per step and group that has parameters"
    assert not {READ, "_to_copy"} & set(fused_calls.names)
    monkeypatch.undo()
    with Operators() as plain_calls:
        train(AdamW, adam_w_mode=True)
    assert READ in plain_calls.names, "the slow twin reads its steps"


def test_the_norm_is_megatrons_bit_by_bit_without_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=generator) for size in (1, 5, 4097, 70001)]
    grads.append(torch.randn(33, 65, generator=generator))
    with Operators() as calls:
        found, _ = total_norm(2048 * 32, None, [grads], False)
    assert READ not in calls.names
    assert found.shape == (1,) and found.dtype == torch.float32
    rebound = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: rebound(*args, **kwargs | {"device": "cpu"}))
    with Operators() as megatrons_calls:
        megatrons, _ = local_multi_tensor_l2_norm(2048 * 32, None, [grads], False)
    assert torch.equal(found, megatrons)
    assert READ in megatrons_calls.names, "negative control; those within torch.tensor do not show"
