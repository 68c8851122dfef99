"""Packed attention against one sequence at a time, alone and inside Megatron's model."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from places import TOY
from torch import Tensor

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.config.file import load_config
from srlm_mega.config.training import ParallelConfig
from srlm_mega.training import attention_varlen
from srlm_mega.training.attention_sdpa import (
    PackedSequences,
    SdpaAttention,
    causal_attention,
    packed_causal_attention,
)
from srlm_mega.training.attention_varlen import VarlenAttention
from srlm_mega.training.model import build_model, transformer_config
from srlm_mega.training.topology import Topology

LENGTHS = [3, 17, 1, 8]
EPS = torch.finfo(torch.float32).eps


def qkv(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four heads in two groups of size 8: [t, heads, d]."""
    torch.manual_seed(0)
    return tuple(torch.randn(num_tokens, heads, 8, requires_grad=True) for heads in (4, 2, 2))  # type: ignore[return-value]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """The definition: softmax over each sequence's own past, in fp64."""
    outputs = []
    for own in zip(*(tensor.double().split(lengths) for tensor in (q, k, v)), strict=True):
        query, key, value = own[0], own[1].repeat_interleave(2, 1), own[2].repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) / 8**0.5
        future = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), value))
    return torch.cat(outputs)


def bound(lengths: list[int]) -> float:
    """How far sums in fp32, in any order, may be from fp64.

    Outputs and gradients are below 8 here, where fp32 numbers are 4 eps apart: each addition rounds by at most 2 eps. A
    score adds 8 products, softmax and output one number per key, and a key's gradient two heads' numbers per query.
    """
    return 2 * EPS * (8 + 2 * max(lengths))


def difference(lengths: list[int], true_lengths: list[int]) -> float:
    """Largest difference in the output and the three gradients."""
    inputs = qkv(sum(lengths))
    got, want = packed_causal_attention(*inputs, lengths), one_by_one(*inputs, true_lengths)
    weight = torch.randn(got.shape)
    pairs = [(got, want)]
    pairs += zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((want * weight).sum(), inputs),
        strict=True,
    )
    return max((one.double() - other.double()).abs().max().item() for one, other in pairs)


@pytest.mark.parametrize("lengths", [LENGTHS, [29], [1, 1, 1], [5, 0, 4, 0]])
def test_packed_sequences_see_only_themselves(lengths: list[int]) -> None:
    assert difference(lengths, lengths) < bound(lengths)


def test_a_shifted_boundary_would_be_seen() -> None:
    """Negative control."""
    assert difference(LENGTHS, [3, 18, 1, 7]) > 1000 * bound(LENGTHS)


def test_one_sequence_is_plain_causal_attention() -> None:
    q, k, v = qkv(12)
    assert torch.equal(packed_causal_attention(q, k, v, [12]), causal_attention(q[None], k[None], v[None])[0])


def test_lengths_that_do_not_fill_the_tokens_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="split"):
        packed_causal_attention(*qkv(12), [5, 6])


def test_a_packed_model_equals_one_sequence_at_a_time() -> None:
    """Logits of a whole model, with positions that start again in each sequence.

    A logit, below 0.5 here, passes some 560 additions of at most eps / 2 of it each: errors of either sign add up to
    about sqrt(560) * eps / 2 * 0.5 = 7e-7.
    """
    shape = LlamaShape(2, 32, 48, 4, 2, 64, 64, 1e-5, 10000.0, False)
    config = load_config(TOY)
    with Topology.start(ParallelConfig(), config.trainer, seed=0) as topology, torch.no_grad():
        (model,) = build_model(transformer_config(shape, config.sft, config, topology), shape, topology)
        model.eval()
        tokens = torch.randint(64, (1, sum(LENGTHS)))
        positions = [torch.arange(length)[None] for length in LENGTHS]
        want = torch.cat(
            [model(own, place, None)[0] for own, place in zip(tokens.split(LENGTHS, 1), positions, strict=True)]
        )
        packed = model(tokens, torch.cat(positions, 1), None, packed_seq_params=PackedSequences.of(LENGTHS))[0]
        shifted = model(tokens, torch.cat(positions, 1), None, packed_seq_params=PackedSequences.of([3, 18, 1, 7]))[0]
    assert (packed - want).abs().max() < 1e-5
    assert (shifted - want).abs().max() > 1e-2  # negative control


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[SdpaAttention]]:
    """The package's two functions by their documented signatures (2.8), computed by the definition in fp64."""

    def varlen(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert causal and dropout_p == 0.0 and softmax_scale is None and max_seqlen_q == max_seqlen_k == max(LENGTHS)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        return one_by_one(q, k, v, cu_seqlens_q.diff().tolist()).float()

    def padded(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):  # type: ignore[no-untyped-def]
        assert causal and dropout_p == 0.0 and softmax_scale is None
        return torch.stack([one_by_one(*row, [q.size(1)]) for row in zip(q, k, v, strict=True)]).float()

    package = ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func = padded, varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    module = importlib.import_module("srlm_mega.training.attention_flash")
    yield module.FlashAttention
    del sys.modules[module.__name__]  # whoever comes next gets the real package


@pytest.fixture
def varlen_attention(monkeypatch: pytest.MonkeyPatch) -> type[SdpaAttention]:
    """PyTorch's operator by the names of its schema, computed by the definition in fp64."""

    def operator(  # type: ignore[no-untyped-def]
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale
    ):
        assert is_causal and dropout_p == 0.0 and scale is None and max_q == max_k == max(LENGTHS)
        assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32
        return one_by_one(query, key, value, cum_seq_q.diff().tolist()).float(), None, None, None, None

    monkeypatch.setattr(attention_varlen, "flash_attention", operator)
    return VarlenAttention


def core(attention: type[SdpaAttention]) -> SdpaAttention:
    """A core attention as Megatron builds it."""
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2)
    return attention(config, 1, AttnMaskType.causal, "self", None, None, None).eval()


@pytest.mark.parametrize("attention", ["flash_attention", "varlen_attention"])
def test_flash_attention_is_called_as_it_wants(attention: str, request: pytest.FixtureRequest) -> None:
    """The real ones run on CUDA only (tests/gpu); here stand-ins with their signatures."""
    flash, sdpa = core(request.getfixturevalue(attention)), core(SdpaAttention)
    q, k, v = qkv(sum(LENGTHS))
    one_row = [tensor.unsqueeze(1) for tensor in (q, k, v)]
    packed = PackedSequences.of(LENGTHS)
    room = {"atol": bound(LENGTHS), "rtol": 0.0}
    torch.testing.assert_close(
        flash(*one_row, None, packed_seq_params=packed), sdpa(*one_row, None, packed_seq_params=packed), **room
    )
    rows = [tensor[:24].view(12, 2, *tensor.shape[1:]) for tensor in (q, k, v)]  # [s, b, heads, d]
    torch.testing.assert_close(flash(*rows, None), sdpa(*rows, None), **room)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_pytorchs_operator_takes_the_call_and_has_gradients(dropout: float) -> None:
    """Without a GPU: tensors that have shapes only, by the schema and the derivative of this PyTorch."""
    q, k, v = (tensor.detach().to("meta", torch.bfloat16).requires_grad_() for tensor in qkv(sum(LENGTHS)))
    packed = PackedSequences.of(LENGTHS, torch.device("meta"))
    out = core(VarlenAttention)._attend(q, k, v, packed, dropout)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_heads_that_the_operator_refuses_go_to_sdpa() -> None:
    """Its heads have a multiple of 8 numbers; here 6."""
    q, k, v = (tensor[..., :6] for tensor in qkv(sum(LENGTHS)))
    packed = PackedSequences.of(LENGTHS)
    assert torch.equal(core(VarlenAttention)._attend(q, k, v, packed, 0.0), packed_causal_attention(q, k, v, LENGTHS))
