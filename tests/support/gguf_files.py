"""Small GGUF files, written as llama.cpp's converter writes them, with the library's writer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from torch import Tensor

from srlm_mega.checkpoints_conversion.llama import LlamaShape, RopeScaling

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
LAYER = {  # llama.cpp's name -> Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def tokenizer_metadata(vocab_size: int) -> dict[str, Any]:
    """A SentencePiece tokenizer: three special tokens, the bytes, and letters."""
    letters = [chr(ord("a") + number) if number < 26 else f"[PAD{259 + number}]" for number in range(vocab_size - 259)]
    kinds = [TokenType.NORMAL if len(letter) == 1 else TokenType.UNUSED for letter in letters]
    return {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *letters],
        "scores": [0.0] * 259 + [-float(number) for number in range(len(letters))],
        "token_type": [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256, *kinds],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def metadata_of(shape: LlamaShape) -> dict[str, Any]:
    """The sizes and constants of a model under llama.cpp's keys."""
    return {
        "block_count": shape.num_layers,
        "context_length": shape.max_position_embeddings,
        "embedding_length": shape.hidden_size,
        "feed_forward_length": shape.ffn_hidden_size,
        "attention.head_count": shape.num_attention_heads,
        "attention.head_count_kv": shape.num_query_groups,
        "attention.layer_norm_rms_epsilon": float(np.float32(shape.norm_epsilon)),
        "rope.freq_base": shape.rotary_base,
        "rope.dimension_count": shape.kv_channels,
        "vocab_size": shape.vocab_size,
    }


def tensors_of(shape: LlamaShape, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """fp32 arrays by llama.cpp's names, queries and keys in its order, Llama 3's factors if it has any."""
    tensors = {
        f"{name}.weight": weights[f"{other}.weight"] for name, other in OTHERS.items() if f"{other}.weight" in weights
    }
    for layer in range(shape.num_layers):
        for name, other in LAYER.items():
            tensors[f"blk.{layer}.{name}.weight"] = weights[f"model.layers.{layer}.{other}.weight"]
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if ".attn_q." in name:
            arrays[name] = permuted(array, shape.num_attention_heads)
        if ".attn_k." in name:
            arrays[name] = permuted(array, shape.num_query_groups)
    if shape.rope_scaling is not None:
        arrays["rope_freqs.weight"] = rope_freqs(shape.rope_scaling, shape.kv_channels, shape.rotary_base)
    return arrays


def permuted(weights: Any, heads: int) -> Any:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def rope_freqs(scaling: RopeScaling, dim: int, base: float) -> Any:
    """`LlamaModel.generate_extra_tensors` of convert_hf_to_gguf.py."""
    freqs = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    old_context = scaling.original_max_position_embeddings
    factors = []
    for freq in freqs:
        wave_length = 2 * torch.pi / freq
        if wave_length < old_context / scaling.high_freq_factor:
            factors.append(1.0)
        elif wave_length > old_context / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = old_context / wave_length - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            factors.append(float(1 / ((1 - smooth) / scaling.factor + smooth)))
    return np.array(factors, np.float32)


def write_gguf(
    path: Path,
    shape: LlamaShape,
    tensors: Mapping[str, Any],
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    tokenizer: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    architecture: str = "llama",
) -> Path:
    """Write matrices as `kind` and vectors as fp32. `tensors` of bytes are blocks of `kind` already; `tokenizer` and
    `model` replace metadata, and None takes a key out."""
    writer = GGUFWriter(path, architecture)
    metadata = {f"{architecture}.{key}": value for key, value in (metadata_of(shape) | dict(model or {})).items()}
    words = {
        f"tokenizer.ggml.{key}": value for key, value in (tokenizer or tokenizer_metadata(shape.vocab_size)).items()
    }
    for key, value in (metadata | words).items():
        match value:
            case None:
                continue
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, list(value))
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for name, array in tensors.items():
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=kind)
        elif array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
