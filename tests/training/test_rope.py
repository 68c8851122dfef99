"""Rotary embedding: Llama 3's scaling is transformers', what Megatron cannot compute is refused; packed sequences."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.errors import UserError
from srlm_mega.training.model import LLAMA3_ROPE, check_rope_scaling

SHAPE = LlamaShape(1, 512, 64, 4, 4, 20, 131072, 1e-5, 500000.0, rope_scaling=replace(LLAMA3_ROPE, factor=32.0))


def megatron(scaled: bool) -> torch.Tensor:
    """Inverse frequencies as the trainer's model has them."""
    rope = RotaryEmbedding(
        SHAPE.kv_channels,
        1.0,
        rotary_base=SHAPE.rotary_base,
        rope_scaling=scaled,
        rope_scaling_factor=32.0,
        use_cpu_initialization=True,
    )
    return rope.inv_freq


def test_frequencies_are_those_of_transformers() -> None:
    want = LlamaRotaryEmbedding(LlamaConfig(**SHAPE.to_huggingface())).inv_freq
    # A power of the base is e^(x * ln base) with x below 1: rounding the exponent, up to ln 500000 = 13, is a relative
    # error of up to 13 eps / 2 on either side. The scaling rounds a few more times.
    assert torch.allclose(megatron(scaled=True), want, rtol=16 * torch.finfo(torch.float32).eps, atol=0)
    assert not torch.allclose(megatron(scaled=False), want, rtol=0.1, atol=0)


def test_other_constants_are_refused() -> None:
    check_rope_scaling(SHAPE)
    check_rope_scaling(replace(SHAPE, rope_scaling=None))
    with pytest.raises(UserError, match=r"the trainer computes only .*factor=8\.0.*has .*low_freq_factor=2\.0"):
        check_rope_scaling(replace(SHAPE, rope_scaling=replace(LLAMA3_ROPE, low_freq_factor=2.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[3, 17, 1, 8], [29]])
def test_packed_by_position_is_megatrons_by_bounds(lengths: list[int], dtype: torch.dtype) -> None:
    """The trainer gathers a pack's angles once, by position; Megatron cuts them by bounds that it reads in every layer.
    Each number is the same product and sum of the same numbers, so all bits are equal."""
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4)
    angles = torch.randn(max(lengths), 1, 1, 16)
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)  # the context-parallel ranks
    query = torch.randn(sum(lengths), 4, 16, dtype=dtype)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in lengths])
    want = apply_rotary_pos_emb(query, angles, config, bounds, cp_group=alone)
    one_row = apply_rotary_pos_emb(query[:, None], angles.index_select(0, positions), config, cp_group=alone)
    assert torch.equal(one_row[:, 0], want)
