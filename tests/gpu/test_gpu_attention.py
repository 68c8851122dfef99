"""The plain PyTorch layers with each FlashAttention against the same with scaled_dot_product_attention, packed."""

from collections.abc import Callable

import pytest
import torch
from gpu_runs import WIDE_7B, Figures, largest_gap, run_config, sft_losses
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from srlm_mega.training import backend
from srlm_mega.training.attention_sdpa import PackedSequences, SdpaAttention, packed_causal_attention
from srlm_mega.training.attention_varlen import VarlenAttention

LENGTHS = [513, 1, 1024, 77]
needs_flash = pytest.mark.skipif(not backend.installed("flash_attn"), reason="flash_attn is not installed")
KINDS = [pytest.param("flash_attn", marks=needs_flash), "torch_varlen"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(kind: str) -> Attend:
    """Attention of packed sequences with grouped queries, as the layers call it."""
    attention: type[SdpaAttention] = VarlenAttention
    if kind == "flash_attn":
        from srlm_mega.training.attention_flash import FlashAttention

        attention = FlashAttention
    config = TransformerConfig(num_layers=1, hidden_size=4096, num_attention_heads=32, num_query_groups=8)
    core = attention(config, 1, AttnMaskType.causal, "self", None, None, None)
    packed = PackedSequences.of(LENGTHS, torch.device("cuda"))
    return lambda q, k, v: core._attend(q, k, v, packed, 0.0)


def with_gradients(attention: Attend, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """The output, and the gradients of the three inputs, in fp64."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = attention(*leaves)
    return [tensor.double() for tensor in (out, *torch.autograd.grad(out, leaves, weight.to(out.dtype)))]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_flash_is_as_right_as_sdpa(kind: str, figures: Figures) -> None:
    """Its errors against fp64 are at most twice those of scaled_dot_product_attention in the same precision."""
    torch.manual_seed(0)
    q, k, v, weight = (
        torch.randn(sum(LENGTHS), heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8, 32)
    )
    flash = with_gradients(attend(kind), [q, k, v], weight)
    sdpa = with_gradients(lambda *inputs: packed_causal_attention(*inputs, LENGTHS), [q, k, v], weight)
    exact = [q.double(), k.double(), v.double()]
    truth = with_gradients(lambda *inputs: packed_causal_attention(*inputs, LENGTHS), exact, weight)
    for name, one, other, due in zip(("output", "query", "key", "value"), flash, sdpa, truth, strict=True):
        errors = {kind: (one - due).abs().max().item(), "sdpa": (other - due).abs().max().item()}
        figures[f"{kind}, largest error: {name}"] = errors
        assert errors[kind] <= 2 * errors["sdpa"], name
    shifted = packed_causal_attention(*exact, [512, 2, *LENGTHS[2:]])
    assert (flash[0] - shifted).abs().max().item() > 10 * (sdpa[0] - truth[0]).abs().max().item()  # negative control


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_training_with_flash_follows_sdpa(kind: str, figures: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = run_config(WIDE_7B, "cuda", bf16=True, layer_backend="torch")
    monkeypatch.setattr(backend, "choose_attention", lambda config, device: kind)
    flash = sft_losses(settings)
    monkeypatch.setattr(backend, "choose_attention", lambda config, device: "sdpa")
    gap = largest_gap(flash, sft_losses(settings))
    figures[f"{kind} against SDPA"] = {"largest_gap": gap}
    assert gap < 0.02
