"""The shape from configs of both generations of transformers, and the table of names."""

from typing import Any

import pytest

from srlm_mega.checkpoints_conversion.llama import LlamaShape, check_names, huggingface_shapes

# Llama 2 70B's published config.json.
LLAMA2_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 8192, "initializer_range": 0.02, "intermediate_size": 28672, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.32.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip


def test_llama2_70b() -> None:
    shape = LlamaShape.from_huggingface(LLAMA2_70B)
    assert shape == LlamaShape(80, 8192, 28672, 64, 8, 32000, 4096, 1e-5, 10000.0, tie_word_embeddings=False)
    assert shape.kv_channels == 128
    sizes = huggingface_shapes(shape)
    assert len(sizes) == 3 + 9 * 80
    assert sizes["model.layers.79.self_attn.v_proj.weight"] == (1024, 8192)
    parameters = sum(size[0] * (size[1] if len(size) == 2 else 1) for size in sizes.values())
    assert parameters == 68_976_648_192  # as transformers counts it


def test_both_spellings_of_the_rotary_base_are_read() -> None:
    old = LLAMA2_70B | {"rope_theta": 500000.0}
    new = LLAMA2_70B | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    assert LlamaShape.from_huggingface(old) == LlamaShape.from_huggingface(new)
    assert LlamaShape.from_huggingface(new).rotary_base == 500000.0


def test_a_config_without_groups_has_a_group_per_head() -> None:
    config = {key: value for key, value in LLAMA2_70B.items() if key != "num_key_value_heads"}
    assert LlamaShape.from_huggingface(config).num_query_groups == 64


def test_written_and_read_again() -> None:
    shape = LlamaShape(3, 48, 96, 6, 2, 100, 77, 1e-6, 123.0, tie_word_embeddings=True)
    assert LlamaShape.from_huggingface(shape.to_huggingface()) == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', supported is 'llama'"),
        ({"attention_bias": True}, "attention_bias is True, supported is False"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling has no low_freq_factor, high_freq"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ({"head_dim": 64}, "head_dim 64 is not hidden_size / num_attention_heads = 8192 / 64 = 128"),
        ({"num_key_value_heads": 7}, "num_attention_heads 64 is not divisible by num_query_groups 7"),
    ],
)
def test_what_is_no_plain_llama_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        LlamaShape.from_huggingface(LLAMA2_70B | change)


def test_a_missing_key_is_named() -> None:
    config = {key: value for key, value in LLAMA2_70B.items() if key != "hidden_size"}
    with pytest.raises(ValueError, match="has no hidden_size"):
        LlamaShape.from_huggingface(config)


def test_missing_and_unknown_tensors_are_named() -> None:
    shape = LlamaShape(1, 4, 6, 2, 1, 5, 3, 1e-5, 10000.0)
    names = set(huggingface_shapes(shape))
    check_names(names | {"model.layers.0.self_attn.rotary_emb.inv_freq"}, shape, "it")
    with pytest.raises(ValueError, match=r"it has no tensor lm_head\.weight"):
        check_names(names - {"lm_head.weight"}, shape, "it")
    with pytest.raises(ValueError, match=r"it holds unknown tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        check_names(names | {"model.layers.1.mlp.up_proj.weight"}, shape, "it")
    with pytest.raises(ValueError, match=r"lm_head\.weight, model\.embed_tokens.* and 9 more"):
        check_names([], shape, "it")


def test_a_tied_output_has_no_tensor_of_its_own() -> None:
    tied = LlamaShape(1, 4, 6, 2, 1, 5, 3, 1e-5, 10000.0, tie_word_embeddings=True)
    assert "lm_head.weight" not in huggingface_shapes(tied)
    check_names({*huggingface_shapes(tied), "lm_head.weight"}, tied, "it")  # old checkpoints have both
