"""Models in llama2.c's first `.bin` format (github.com/karpathy/llama2.c): a header and fp32 tensors, no names."""

import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from srlm_mega.checkpoints_conversion.llama import LlamaShape

HEADER = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len
PER_LAYER = {  # llama2.c's name -> Hugging Face's, in the order of the file
    "rms_att": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "rms_ffn": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}


def convert(path: Path) -> tuple[LlamaShape, dict[str, Tensor]]:
    """A `.bin` file as shape and weights of the Hugging Face layout. ValueError when the file is not one."""
    shape, tensors = read(path)
    tensors["wq"] = torch.stack([half_split_rotary(wq, shape.num_attention_heads) for wq in tensors["wq"]])
    tensors["wk"] = torch.stack([half_split_rotary(wk, shape.num_query_groups) for wk in tensors["wk"]])
    weights = {"model.embed_tokens.weight": tensors["token_embedding"]}
    for layer in range(shape.num_layers):
        for name, huggingface in PER_LAYER.items():
            weights[f"model.layers.{layer}.{huggingface}.weight"] = tensors[name][layer]
    weights["model.norm.weight"] = tensors["rms_final"]
    if not shape.tie_word_embeddings:
        weights["lm_head.weight"] = tensors["wcls"]
    return shape, weights


def half_split_rotary(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of q or k from Meta's rotary order to Hugging Face's: [num_heads * d, h] -> the same shape.

    Meta rotates rows (0, 1), (2, 3), ... of a head together, Hugging Face rows (0, d/2), (1, d/2 + 1), ...
    """
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def read(path: Path) -> tuple[LlamaShape, dict[str, Tensor]]:
    """The file as it is: tensors by llama2.c's names, per-layer ones stacked [layers, ...], rotary pairs interleaved.

    ValueError unless header and size fit each other.
    """
    content = path.read_bytes()
    if len(content) < HEADER.size:
        raise ValueError(f"{path} has {len(content)} bytes, not even a header: it is no llama2.c model")
    dim, hidden, layers, heads, kv_heads, vocab, length = HEADER.unpack_from(content)
    if min(dim, hidden, layers, heads, kv_heads, length) <= 0 or vocab == 0:
        raise ValueError(f"{path} does not begin with llama2.c's header: it is no llama2.c model of the first format")
    shape = LlamaShape(
        num_layers=layers,
        hidden_size=dim,
        ffn_hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        vocab_size=abs(vocab),
        max_position_embeddings=length,
        norm_epsilon=1e-5,  # llama2.c's run.c has both constants built in
        rotary_base=10000.0,
        tie_word_embeddings=vocab > 0,
    )
    sizes = _sizes(shape)
    due = HEADER.size + 4 * sum(math.prod(size) for size in sizes.values())
    if len(content) != due:
        raise ValueError(f"{path} has {len(content)} bytes, by its header it should have {due}: download it again")
    flat = torch.frombuffer(bytearray(content[HEADER.size :]), dtype=torch.float32)
    parts = flat.split([math.prod(size) for size in sizes.values()])
    return shape, {name: part.view(size) for (name, size), part in zip(sizes.items(), parts, strict=True)}


def _sizes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Tensors in the order of the file."""
    n, h, ffn = shape.num_layers, shape.hidden_size, shape.ffn_hidden_size
    kv = shape.num_query_groups * shape.kv_channels
    rotary = (shape.max_position_embeddings, shape.kv_channels // 2)
    sizes: dict[str, tuple[int, ...]] = {
        "token_embedding": (shape.vocab_size, h),
        "rms_att": (n, h),
        "wq": (n, h, h),
        "wk": (n, kv, h),
        "wv": (n, kv, h),
        "wo": (n, h, h),
        "rms_ffn": (n, h),
        "w1": (n, ffn, h),
        "w2": (n, h, ffn),
        "w3": (n, ffn, h),
        "rms_final": (h,),
        "rotary_cos": rotary,  # no longer read by llama2.c either
        "rotary_sin": rotary,
    }
    return sizes if shape.tie_word_embeddings else {**sizes, "wcls": (shape.vocab_size, h)}
