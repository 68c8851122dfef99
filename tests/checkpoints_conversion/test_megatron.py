"""Hugging Face -> Megatron -> Hugging Face: bit-identical for every split, and wrong splits change the logits.

That Megatron computes the same logits with these weights is tested where Megatron runs (tests/distributed).
"""

from dataclasses import replace

import pytest
import torch
from merge_shards import merge_shards
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_mega.checkpoints_conversion.layout import split_qkv
from srlm_mega.checkpoints_conversion.llama import LlamaShape, huggingface_shapes
from srlm_mega.checkpoints_conversion.megatron import load_shard
from srlm_mega.checkpoints_conversion.placement import Placement, placements

SHAPE = LlamaShape(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=24,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=20,
    max_position_embeddings=16,
    norm_epsilon=1e-5,
    rotary_base=10000.0,
)
QKV, FC1 = "decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.0.mlp.linear_fc1.weight"
Shards = list[tuple[Placement, dict[str, Tensor]]]


def weights_of(shape: LlamaShape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights; norms too are random, so that none can stand for another."""
    generator = torch.Generator().manual_seed(0)
    sizes = huggingface_shapes(shape)
    return {name: torch.randn(size, generator=generator).mul(0.3).to(dtype) for name, size in sizes.items()}


def shards_of(weights: dict[str, Tensor], shape: LlamaShape, tp: int, pp: int, vpp: int = 1) -> Shards:
    """What every rank of a layout holds."""
    return [(place, load_shard(weights, shape, place)) for place in placements(shape, tp, pp, vpp)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("groups", [4, 8], ids=["gqa", "mha"])
@pytest.mark.parametrize(
    ("tp", "pp", "vpp"), [(tp, pp, 1) for tp in (1, 2, 4) for pp in (1, 2, 4)] + [(2, 2, 2), (1, 2, 2)]
)
def test_round_trip_is_bit_identical(tp: int, pp: int, vpp: int, groups: int, tied: bool, dtype: torch.dtype) -> None:
    shape = replace(SHAPE, num_query_groups=groups, tie_word_embeddings=tied)
    weights = weights_of(shape, dtype)
    shards = shards_of(weights, shape, tp, pp, vpp)
    assert len(shards) == tp * pp * vpp
    merged = merge_shards(shards[::-1], shape)  # in any order
    assert list(merged) == list(weights)
    assert all(torch.equal(merged[name], weights[name]) and merged[name].dtype == dtype for name in weights)


def test_what_each_stage_holds() -> None:
    first, last = (set(shard) for _, shard in shards_of(weights_of(SHAPE), SHAPE, tp=1, pp=2))
    both = {
        f"decoder.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in (
            "input_layernorm",
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "pre_mlp_layernorm",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        )
    }
    assert first == both | {"embedding.word_embeddings.weight"}
    assert last == both | {"decoder.final_layernorm.weight", "output_layer.weight"}


def test_a_tied_output_is_copied_to_another_stage_only() -> None:
    tied = replace(SHAPE, tie_word_embeddings=True)
    weights = weights_of(tied)
    ((_, alone),) = shards_of(weights, tied, tp=1, pp=1)
    assert "output_layer.weight" not in alone
    (_, first), (_, last) = shards_of(weights, tied, tp=1, pp=2)
    assert torch.equal(first["embedding.word_embeddings.weight"], last["output_layer.weight"])


def test_sizes_per_rank() -> None:
    """TP 4 of 8 heads with d = 4 in 4 groups: a rank has (2 + 2) * 4 rows of qkv, 2 * 24 / 4 of fc1."""
    shard = shards_of(weights_of(SHAPE), SHAPE, tp=4, pp=1)[3][1]
    assert shard[QKV].shape == (16, 32)
    assert shard["decoder.layers.0.self_attention.linear_proj.weight"].shape == (32, 8)
    assert shard[FC1].shape == (12, 32)
    assert shard["decoder.layers.0.mlp.linear_fc2.weight"].shape == (32, 6)
    assert shard["output_layer.weight"].shape == (5, 32)


def test_virtual_stages_take_turns() -> None:
    """8 layers, PP 2, VPP 2: rank 0 holds 0-1 and 4-5, rank 1 holds 2-3 and 6-7."""
    places = placements(replace(SHAPE, num_layers=8), tp=1, pp=2, vpp=2)
    assert [place.layers for place in places] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [place.first_stage for place in places] == [True, False, False, False]
    assert [place.last_stage for place in places] == [False, False, False, True]


@pytest.mark.parametrize(
    ("change", "tp", "pp", "vpp", "message"),
    [
        ({"num_layers": 5}, 1, 2, 1, r"5 layers / PP 2 leaves 1 over \(5 = 2 \* 2 \+ 1\)"),
        ({"num_layers": 6}, 1, 2, 2, r"6 layers / PP 2 \* VPP 2 = 4 leaves 2 over \(6 = 1 \* 4 \+ 2\)"),
        ({}, 8, 1, 1, r"4 query groups / TP 8 leaves 4 over"),
        ({"vocab_size": 9}, 4, 1, 1, r"9 tokens in parts of 3 leave nothing for the last rank of TP 4"),
        ({"ffn_hidden_size": 25}, 2, 1, 1, r"25 rows of ffn_hidden_size / TP 2 leaves 1 over"),
        ({}, 1, 1, 2, r"2 virtual stages per rank need more than PP 1"),
    ],
)
def test_uneven_splits_show_the_arithmetic(change: dict[str, int], tp: int, pp: int, vpp: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        placements(replace(SHAPE, **change), tp, pp, vpp)  # type: ignore[arg-type]


def logits(weights: dict[str, Tensor], shape: LlamaShape) -> Tensor:
    """transformers' logits of twelve tokens."""
    model = LlamaForCausalLM(LlamaConfig(**shape.to_huggingface()))
    model.load_state_dict(weights)
    with torch.no_grad():
        output: Tensor = model(torch.arange(12)[None]).logits
    return output


def attention_of_layer_0(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """By Hugging Face names."""
    return {f"model.layers.0.self_attn.{part}_proj.weight": tensor for part, tensor in (("q", q), ("k", k), ("v", v))}


def test_swapped_queries_and_keys_would_be_seen() -> None:
    """Negative control: the fused tensor read as [k | q | v]. Shapes fit, numbers do not."""
    shape = replace(SHAPE, num_query_groups=8)
    weights = weights_of(shape)
    ((_, shard),) = shards_of(weights, shape, tp=1, pp=1)
    k, q, v = split_qkv(shard[QKV], 8, 8)
    wrong = {
        f"model.layers.0.self_attn.{part}_proj.weight": tensor for part, tensor in zip("qkv", (q, k, v), strict=True)
    }
    assert all(wrong[name].shape == weights[name].shape for name in wrong)
    assert (logits(weights | wrong, shape) - logits(weights, shape)).abs().max() > 1e-2


def test_concatenated_instead_of_interleaved_qkv_would_be_seen() -> None:
    """Negative control: the fused tensor cut into a q, a k and a v block as if groups were not interleaved."""
    weights = weights_of(SHAPE)
    ((_, shard),) = shards_of(weights, SHAPE, tp=1, pp=1)
    wrong = attention_of_layer_0(*shard[QKV].split([32, 16, 16]))
    assert (logits(weights | wrong, SHAPE) - logits(weights, SHAPE)).abs().max() > 1e-2


def test_wrongly_cut_gate_and_up_would_be_seen() -> None:
    """Negative control: TP 2 shards stacked, then halved, as if each rank held gates or ups only."""
    weights = weights_of(SHAPE)
    stacked = torch.cat([shard[FC1] for _, shard in shards_of(weights, SHAPE, tp=2, pp=1)])
    gate, up = stacked.chunk(2)
    wrong = {"model.layers.0.mlp.gate_proj.weight": gate, "model.layers.0.mlp.up_proj.weight": up}
    assert (logits(weights | wrong, SHAPE) - logits(weights, SHAPE)).abs().max() > 1e-2


def test_a_missing_rank_is_refused() -> None:
    shards = shards_of(weights_of(SHAPE), SHAPE, tp=2, pp=2)
    with pytest.raises(ValueError, match=r"layers 2-3 came from tensor-parallel ranks \[0\], due were 0 to 1"):
        merge_shards(shards[:3], SHAPE)
    with pytest.raises(ValueError, match=r"tensor-parallel ranks \[0, 0, 1\]"):
        merge_shards([*shards, shards[0]], SHAPE)


def test_a_missing_stage_is_refused() -> None:
    shards = shards_of(weights_of(SHAPE), SHAPE, tp=1, pp=2)
    with pytest.raises(ValueError, match=r"the set of model chunks has no tensor lm_head\.weight"):
        merge_shards(shards[:1], SHAPE)


def test_replicas_that_differ_are_refused() -> None:
    shards = shards_of(weights_of(SHAPE), SHAPE, tp=2, pp=1)
    name = "decoder.layers.2.input_layernorm.weight"
    shards[1][1][name] = shards[1][1][name] + 1e-6
    with pytest.raises(ValueError, match=rf"{name} .*differs between tensor-parallel ranks 0 and 1"):
        merge_shards(shards, SHAPE)


def test_tied_copies_that_differ_are_refused() -> None:
    tied = replace(SHAPE, tie_word_embeddings=True)
    shards = shards_of(weights_of(tied), tied, tp=1, pp=2)
    shards[1][1]["output_layer.weight"] = shards[1][1]["output_layer.weight"] * 2
    with pytest.raises(ValueError, match=r"output_layer\.weight is another tensor than model\.embed_tokens\.weight"):
        merge_shards(shards, tied)


def test_names_of_a_shard_are_checked() -> None:
    ((place, shard),) = shards_of(weights_of(SHAPE), SHAPE, tp=1, pp=1)
    merge_shards([(place, shard | {"decoder.layers.0.mlp._extra_state": torch.zeros(1)})], SHAPE)
    with pytest.raises(ValueError, match=r"unknown \['decoder\.layers\.9\.weight'\]"):
        merge_shards([(place, shard | {"decoder.layers.9.weight": torch.zeros(1)})], SHAPE)
    del shard[FC1]
    with pytest.raises(ValueError, match=r"lack \['decoder\.layers\.0\.mlp\.linear_fc1\.weight'\]"):
        merge_shards([(place, shard)], SHAPE)


def test_weights_of_another_shape_are_refused() -> None:
    (place,) = placements(SHAPE, tp=1, pp=1)
    weights = weights_of(SHAPE)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(25, 32)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has shape \[25, 32\].* \[24, 32\]"):
        load_shard(weights, SHAPE, place)
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"has no tensor model\.norm\.weight"):
        load_shard(weights, SHAPE, place)
